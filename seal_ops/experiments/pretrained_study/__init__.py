"""A study of one pretrained model: many small jobs, a JSON file each, shared by as many processes as there are GPUs.

`plan` says what is measured and in which order, `sections` how; `queue` shares the jobs out, `workbench` has the model
and the samples; `summary` says what came out, `tables` and `drawings` show it.
"""
