"""The words that prompts are made of, split into train and held-out halves by a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: What to write about. Each plural loses only its final s in the singular (`mentions` needs it).
TOPICS = _words(
    """
    cats dogs horses birds whales bears lions tigers rabbits turtles frogs bees spiders owls
    ducks cows goats elephants dolphins penguins rivers mountains lakes islands oceans deserts
    clouds stars planets rain snow thunder winter spring autumn trees flowers roses mushrooms
    apples oranges bananas grapes carrots bread cheese butter honey coffee tea soup rice pizza
    pasta chocolate sugar salt music painting dancing football tennis chess swimming cooking
    fishing hiking cycling reading books poems movies songs games trains planes boats cars
    bicycles trucks bridges castles towers houses gardens farms schools hospitals museums
    markets hotels kitchens teachers doctors farmers pilots singers painters soldiers sailors
    robots computers phones clocks lamps mirrors shoes hats coats umbrellas chairs tables
    windows candles coins maps dreams holidays birthdays weddings friendship kindness courage
    patience
    """
)

#: Words to use: common, and none of them a topic, a function word or a word of the instructions.
KEYWORDS = _words(
    """
    golden silent brave gentle simple ancient bright broken careful clever cold curious deep
    distant early empty famous fast fresh friendly funny giant green happy heavy hidden honest
    huge hungry kind lonely long lucky modern narrow noisy old perfect proud quick quiet rare
    rich sharp silver slow small soft strange strong sweet tall tiny tired useful warm wild
    wise wooden young yellow blue red white black morning evening night summer village street
    road forest valley beach storm wind fire stone sand grass leaf shadow light water ice air
    home door wall roof floor room corner paper pencil basket bottle box bag rope wheel engine
    hammer needle ribbon family mother father sister brother child neighbor stranger king queen
    hero artist story secret lesson idea memory promise question answer journey adventure
    dinner breakfast gift money work time world country heart hand voice smile face eye body
    travel learn remember protect build carry follow visit share enjoy grow help discover
    change hold catch
    """
)

#: First words that sentences do begin with.
OPENERS = _words(
    """
    Every Some Many Most When Although In On At After Before During Without With From Under My
    Our Their Your His Her This These All Few Only Sometimes Often Usually People Everyone
    Nobody Once While Because
    """
)

HELDOUT_SHARE = 0.25


@dataclass(frozen=True)
class Vocabulary:
    """The words of one split."""

    topics: tuple[str, ...]
    keywords: tuple[str, ...]
    openers: tuple[str, ...]


def vocabulary(split: str, seed: int) -> Vocabulary:
    """The words of `split`: no topic, keyword or opener of one split is in the other."""
    return Vocabulary(
        *(_part(words, split, f"{seed} {kind}") for kind, words in
          (("topics", TOPICS), ("keywords", KEYWORDS), ("openers", OPENERS)))
    )  # fmt: skip


def _part(words: tuple[str, ...], split: str, seed: str) -> tuple[str, ...]:
    order = random.Random(seed).sample(words, len(words))
    held = round(HELDOUT_SHARE * len(words))
    return tuple(order[:held] if split == "heldout" else order[held:])
