"""A study of one pretrained model: many small jobs, a JSON file each, shared by as many processes as there are GPUs."""
