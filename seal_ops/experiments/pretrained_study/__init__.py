"""A study of one pretrained model: many small jobs, a JSON file each, shared by as many processes as there are GPUs.

`plan` says what is measured and in which order, and `sections` how; `workbench` has the model; `summary` says what came
out, `tables` and `drawings` show it.
"""
