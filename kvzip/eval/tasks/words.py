"""Words that generated tasks are made of."""

from __future__ import annotations

import random

CATEGORIES = {
    "animal": "otter badger heron lynx beaver falcon hedgehog salmon walrus gecko moose raven ferret lobster swan "
    "donkey panther tortoise squirrel weasel buffalo magpie penguin spider",
    "tool": "hammer chisel wrench pliers ladle shovel anvil drill spanner rake axe lathe trowel mallet tweezers saw "
    "scissors ladder crowbar needle spade broom hoe sickle",
    "fruit": "apricot papaya plum cherry quince mango lychee fig raspberry guava melon pear banana grape lemon peach "
    "pomegranate kiwi coconut mulberry tangerine nectarine cranberry olive",
    "instrument": "violin oboe trumpet banjo harp cello tuba flute drum lute bagpipe piano clarinet accordion "
    "trombone mandolin zither xylophone bassoon guitar organ cymbal fiddle ukulele",
    "clothing": "scarf mitten waistcoat trousers bonnet apron sandal cardigan sock glove shawl blouse jacket skirt "
    "boot sweater raincoat slipper turban necktie overalls kimono vest belt",
    "place": "harbour meadow cathedral bakery glacier canyon library orchard lighthouse quarry museum desert bridge "
    "stadium monastery airport swamp island tavern prison windmill market castle forest",
}
ADJECTIVES = (
    "small", "old", "bright", "quiet", "heavy", "strange", "famous", "broken", "green", "hidden", "pale", "noble",
    "cheap", "foreign", "plain", "yellow",
)  # fmt: skip
SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in "aeiou")


def coined_words(rng: random.Random, count: int, syllables: int = 3) -> list[str]:
    """`count` different words that are in no language on purpose."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(SYLLABLES, k=syllables))] = None
    return list(found)
