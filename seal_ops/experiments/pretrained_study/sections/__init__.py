"""The sections of the study, a file each, in which ``jobs(plan)`` gives the jobs."""
