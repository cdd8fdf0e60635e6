"""What the studies of one model share: a folder of jobs that several processes work on, and samples drawn ahead."""
