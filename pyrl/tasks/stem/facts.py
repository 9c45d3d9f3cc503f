"""Small tables that questions are drawn from."""

from __future__ import annotations

#: Symbol, name, mass number of the most common isotope; the position is the atomic number - 1.
ELEMENTS = [
    ("H", "hydrogen", 1), ("He", "helium", 4), ("Li", "lithium", 7), ("Be", "beryllium", 9),
    ("B", "boron", 11), ("C", "carbon", 12), ("N", "nitrogen", 14), ("O", "oxygen", 16),
    ("F", "fluorine", 19), ("Ne", "neon", 20), ("Na", "sodium", 23), ("Mg", "magnesium", 24),
    ("Al", "aluminium", 27), ("Si", "silicon", 28), ("P", "phosphorus", 31), ("S", "sulfur", 32),
    ("Cl", "chlorine", 35), ("Ar", "argon", 40), ("K", "potassium", 39), ("Ca", "calcium", 40),
]  # fmt: skip
#: Other spellings that are right as well.
SPELLINGS = {
    "aluminium": ["aluminum"], "sulfur": ["sulphur"],
    "mitochondrion": ["mitochondria"], "chloroplast": ["chloroplasts"], "ribosome": ["ribosomes"],
    "nucleus": ["cell nucleus", "nucleus of the cell"],
    "cell membrane": ["plasma membrane", "plasmalemma", "membrane", "cytoplasmic membrane"],
    "outer core": ["Earth's outer core", "liquid outer core"],
    "mantle": ["Earth's mantle"], "crust": ["Earth's crust", "Earth crust"],
}  # fmt: skip

#: Formula → (name, molar mass in g/mol with H 1, C 12, N 14, O 16, Na 23, S 32, Cl 35.5, Ca 40).
MOLAR_MASSES = {
    "H2O": ("water", "18"), "CO2": ("carbon dioxide", "44"), "CH4": ("methane", "16"),
    "NH3": ("ammonia", "17"), "NaCl": ("sodium chloride", "58.5"), "O2": ("oxygen gas", "32"),
    "HCl": ("hydrogen chloride", "36.5"), "H2SO4": ("sulfuric acid", "98"),
    "CaCO3": ("calcium carbonate", "100"), "NaOH": ("sodium hydroxide", "40"),
    "C2H6O": ("ethanol", "46"), "C6H12O6": ("glucose", "180"), "N2": ("nitrogen gas", "28"),
    "SO2": ("sulfur dioxide", "64"),
}  # fmt: skip

#: Species → chromosomes in a body cell.
CHROMOSOMES = {
    "human": 46, "dog": 78, "cat": 38, "horse": 64, "fruit fly": 8, "pea plant": 14,
    "maize plant": 20, "house mouse": 40, "chimpanzee": 48, "onion plant": 16,
}  # fmt: skip

PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]

#: What an organelle, organ or layer does or is → its name.
CELL = {
    "releases most of the energy of nutrients as ATP": "mitochondrion",
    "carries out photosynthesis": "chloroplast",
    "makes proteins by translating messenger RNA": "ribosome",
    "contains most of the DNA of an animal cell": "nucleus",
    "controls what enters and leaves the cell": "cell membrane",
}
EARTH = {
    "contains the ozone that absorbs most ultraviolet light": "stratosphere",
    "has almost all of the weather": "troposphere",
    "is the liquid metal layer that makes the magnetic field": "outer core",
    "is the thickest layer of the solid Earth": "mantle",
    "is the thin outermost layer of rock": "crust",
}
#: Letters that are the same backwards in base pairing.
PAIRS = {"A": "T", "T": "A", "C": "G", "G": "C"}
