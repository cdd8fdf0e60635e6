"""A task of one's own in one file: which box holds the ball, in a long list of boxes.

seal eval --model models/seal-tiny --task own_task:Boxes --lengths 512 1024 --cases 20    # in this folder
"""

from seal_ops.tasks import Task


class Boxes(Task):
    name = "boxes"
    item = "box"
    max_new_tokens = 20

    def write(self, rng, num_items, *, index, split):
        """One sample with `num_items` boxes; called until they fill the token length."""
        boxes = [f"{rng.choice('ABCDEFGH')}{number}" for number in rng.sample(range(10_000), num_items)]
        holding = rng.randrange(num_items)
        record = "".join(f"Box {box} is {'full' if i == holding else 'empty'}.\n" for i, box in enumerate(boxes))
        meta = {"box": boxes[holding], "depth": holding / max(num_items - 1, 1)}
        return f"{record}\nWhich box is full?\n", f"The full box is {boxes[holding]}.", meta

    def score(self, sample, text):
        return float(sample.meta["box"] in text.replace(".", " ").split())
