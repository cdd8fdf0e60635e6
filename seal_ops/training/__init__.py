"""One run of training.

`loop` has `train`, its arguments and the loop over the steps.  `settings` checks the arguments, `samples` and `texts`
the samples, `groups` what is trained and at which rate.  `step` is one optimiser step, and `sample_order` says on which
samples.  `run_folder` saves and resumes, and `checkpoint` is the file.  `memory_plan` decides what layers keep,
`frozen_linears` puts frozen weights into fp8, and `processes` divides a run among several.
"""
