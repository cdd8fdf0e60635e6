"""The frozen linear layers of a model in training, whose products run in fp8 where that is asked for."""
