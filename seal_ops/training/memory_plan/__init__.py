"""What each decoder layer keeps for the backward pass: measured, planned for the memory that is free, and run.

`planning` has `Plan` and the planner.  It is told the `costs` by `measuring`, which runs `short_samples` through the
`decoder`; `simulation` adds them up for a plan.  `execution` runs a model as one plan says, with `tiling` and
`last_rows`, and `planned_model` during a whole run.  `memory` is what the device has.
"""
