"""The words that prompts are made of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _pairs(text: str) -> dict[str, str]:
    return {left: right for left, _, right in (t.partition(": ") for t in _lines(text))}


#: What to write. None has a comma, a digit or a question mark (the request may be repeated).
REQUESTS = _lines(
    """
    Write a short story about {topic}
    Write a letter to a friend about {topic}
    Write an e-mail to a colleague about {topic}
    Write a speech about {topic}
    Write a blog post about {topic}
    Write a diary entry about {topic}
    Write a news report about {topic}
    Write a dialogue between two people about {topic}
    Write a review of a book about {topic}
    Write a beginner's guide to {topic}
    Write an advertisement for a museum about {topic}
    Write a note to the neighbors about {topic}
    Write an encyclopedia entry about {topic}
    Write the opening of a novel about {topic}
    Write a radio announcement about {topic}
    Write a cover letter for a job that has to do with {topic}
    Explain what a child should know about {topic}
    Explain why some people care so much about {topic}
    Give advice to somebody who knows nothing about {topic}
    Describe a memorable day that had to do with {topic}
    Describe the history of {topic}
    Compare two ways of learning about {topic}
    Summarize the most common opinions about {topic}
    Argue in favor of spending more money on {topic}
    """
)

#: Who it is for and how it sounds: completes a request.
MANNERS = _lines(
    """
    in a friendly tone
    in a formal tone
    in a humorous tone
    in plain words
    for readers of a local newspaper
    for a class of teenagers
    for a group of retired teachers
    for busy parents
    for visitors from another country
    for a panel of experts
    in the style of a fairy tale
    as an old sailor would tell it
    """
)

#: Yes-or-no questions, for the instruction that offers fixed replies.
QUESTIONS = _lines(
    """
    Should every school teach children about {topic}?
    Is {topic} a good subject for a film?
    Would a small town gain from a festival about {topic}?
    Is {topic} worth an hour of your time each week?
    Will {topic} matter as much to our grandchildren as to us?
    Can a person be happy without any interest in {topic}?
    Do newspapers write enough about {topic}?
    """
)

#: topic → how a word begins that an answer about it has.
TOPICS = _pairs(
    """
    lighthouses: lighthouse
    the night train: train
    honey bees: bee
    learning to swim: swim
    a village bakery: bak
    mountain rescue dogs: dog
    city gardens: garden
    old maps: map
    the first snow: snow
    school libraries: librar
    fishing boats: boat
    hot air balloons: balloon
    street musicians: music
    solar eclipses: eclips
    chess clubs: chess
    wild mushrooms: mushroom
    the invention of paper: paper
    robots in hospitals: robot
    coffee houses: coffee
    deserts: desert
    volcanoes: volcan
    penguins: penguin
    the violin: violin
    antique clocks: clock
    bicycle repair: bicycl
    rain forests: forest
    weather forecasts: weather
    river floods: flood
    suspension bridges: bridge
    stamp collecting: stamp
    home cooking: cook
    family photographs: photo
    marathon running: run
    the human heart: heart
    whale migration: whale
    castles: castle
    handwritten letters: letter
    public parks: park
    computer games: game
    space telescopes: telescop
    pottery: pot
    wooden toys: toy
    sleep: sleep
    friendship between neighbors: friend
    moving to a new city: city
    planting trees: tree
    learning the piano: piano
    a lost umbrella: umbrella
    mountain climbing: climb
    the price of bread: bread
    puppet theater: puppet
    recycling glass: glass
    ancient Rome: rom
    dinosaurs: dinosaur
    electric cars: car
    a broken elevator: elevator
    saving water: water
    birthday parties: birthday
    dreams: dream
    the local football team: football
    a visit to the dentist: dentist
    kite flying: kite
    storms at sea: storm
    sign language: sign
    the circus: circus
    growing tomatoes: tomato
    secret codes: code
    ice skating: skat
    the moon landing: moon
    noisy roommates: roommate
    cheese: chees
    wolves: wol
    working from home: work
    a summer camp: camp
    astronauts: astronaut
    blind tasting of chocolate: chocolate
    lost luggage: luggage
    night markets: market
    folk songs: song
    the postal service: post
    """
)

#: Words to use, common enough for any subject. In no request.
KEYWORDS = _words(
    """
    quiet golden curious surprise careful promise window journey shadow gentle patience courage
    moment village corner basket whisper silver orange laughter mistake secret answer simple strange
    yellow morning evening weekend breakfast kitchen pocket ladder mirror candle blanket bottle
    button pencil jacket hammer carpet garage stairs market harbor valley meadow cloud thunder
    thousand beginning memory lesson journal visitor stranger neighbor captain doctor farmer painter
    generous stubborn honest clever sudden narrow ancient modern bright hidden
    """
)

#: Words to avoid: such as many texts have. In no request, KEYWORDS, or given sentence.
AVOIDED = _words(
    """
    always never really people important world great beautiful things because different
    experience perfect amazing life heart joy love special together imagine every
    time one just way also even
    """
)

#: First words of paragraphs.
OPENERS = _words(
    """
    although before many once nobody sometimes later finally however today everyone meanwhile still
    after perhaps nevertheless usually
    """
)

#: Whole sentences to begin with.
BEGINNINGS = (
    "Let me tell you something.",
    "Here is what I have to say.",
    "It all begins with a question.",
    "Nobody expected this.",
    "This needs some explanation.",
    "There is more to it than meets the eye.",
)

#: Whole sentences to end with.
ENDINGS = (
    "That is all for now.",
    "Please let me know what you think.",
    "And the rest is history.",
    "I hope this helps.",
    "Nothing more needs to be said.",
    "Thank you for reading to the end.",
    "What happens next is up to you.",
    "Is there anything else I can help with?",
)

POSTSCRIPTS = ("P.S.", "P.P.S.")

#: Sets of replies of which one is to be chosen.
REPLIES = (
    ("My answer is yes.", "My answer is no.", "My answer is maybe."),
    ("I agree.", "I disagree.", "I cannot decide."),
    ("Certainly so.", "Certainly not.", "It depends."),
)

#: Keys of a JSON object.
KEYS = ("title", "summary", "author", "mood", "place", "conclusion", "audience", "message")

#: Letters to use often: those that English prose has in one to three letters out of a hundred; and
#: to use seldom: one or two of a hundred.
FREQUENT = tuple("bcfglmpuwy")
SELDOM = tuple("bfgkvwpy")
