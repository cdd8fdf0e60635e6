"""Word lists from which retrieval keys ``{adjective}-{noun}`` are drawn.

100 adjectives and 100 nouns give 10,000 distinct keys, more than any record of lines needs.  All words are common,
lower case, ASCII and free of hyphens, and no word is in both lists, so a key splits into its parts in one way only.
The tokenizer of ``models/seal-tiny`` holds each of these words as one token: changing a list means training that
model again (``tests/package/test_tiny_model.py`` notices).
"""

ADJECTIVES = tuple(
    """
    able amber ancient angry bitter blue bold brave brief bright
    broad brown busy calm careful cheap civil clean clever cold
    cool cosmic crimson curious damp dark dear deep dull eager
    early elegant empty fair famous fancy fast fierce firm flat
    fond fresh gentle giant glad golden grand gray great green
    happy hard heavy hidden hollow honest huge humble icy jolly
    keen kind large lazy light little lively lonely loud loyal
    lucky mellow merry mild modern narrow neat noble odd pale
    patient plain polite proud pure quick quiet rapid rare red
    rich rough round royal rusty salty sharp shy silent silver
    """.split()
)

NOUNS = tuple(
    """
    acorn anchor apple arrow badge banjo barrel basket beach bell
    bicycle bird boat book bottle bridge brush bucket button cabin
    camel candle canyon carpet castle cloud clock coin compass coral
    cradle crow desert drum eagle engine falcon feather fiddle field
    flute forest fox garden glove hammer harbor hawk helmet horse
    island jacket jungle kettle kitten ladder lake lantern lemon lion
    marble meadow mirror moon mountain needle oak ocean orange otter
    owl paddle panda paper pencil piano pillow planet pond rabbit
    rain ribbon river rocket rose saddle sail shell ship spoon
    star stone table tiger tower train tree valley violin window
    """.split()
)
