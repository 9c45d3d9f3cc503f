"""Names that puzzles draw from. All names of all pools differ, so an answer names one thing."""

#: The host, who is killed in every puzzle.
VICTIM = "Lord Ashcombe"

SUSPECTS = (
    "Ada Thornbury",
    "Bertram Locke",
    "Cecily Marsh",
    "Dorian Fenwick",
    "Edith Garrow",
    "Felix Hawthorne",
    "Greta Lindqvist",
    "Hugo Pembroke",
    "Imogen Vance",
    "Jasper Quill",
    "Kitty Radcliffe",
    "Leopold Stanhope",
)

WEAPONS = (
    "Dagger",
    "Fire Poker",
    "Garrotte",
    "Hatchet",
    "Letter Opener",
    "Paperweight",
    "Pistol",
    "Sabre",
    "Syringe",
    "Walking Stick",
)

#: Every one reads well after "in the".
ROOMS = (
    "Armoury",
    "Attic",
    "Bathhouse",
    "Boathouse",
    "Boudoir",
    "Cellar",
    "Chapel",
    "Coach House",
    "Gallery",
    "Great Hall",
    "Greenhouse",
    "Map Room",
    "Morning Room",
    "Music Room",
    "Nursery",
    "Observatory",
    "Pantry",
    "Scullery",
    "Smoking Room",
    "Stable",
)

#: Every one reads well after "motivated by".
MOTIVES = (
    "Blackmail",
    "Cruelty",
    "Debt",
    "Disgrace",
    "Envy",
    "Heartbreak",
    "Inheritance",
    "Madness",
    "Obsession",
    "Rivalry",
    "Spite",
    "Vengeance",
)
