"""Texts of problems.py: names, stories with a running total, and formulas with their own steps.

Slots: {A}, {B} names; {he}, {his} for A; {n}, {k}, {m} or a variable for numbers; {eq} the equation or
its result. A phrase starts in lower case and has no full stop, so that it fits after "First, ".
"""
from typing import NamedTuple

NAMES = [(n, "m") for n in ("Tom", "Ben", "Omar", "Luis", "Raj", "Kofi", "Ivan", "Noah", "Sam", "Leo", "Hugo",
                            "Amir", "Jack", "Paul", "Theo", "Dan", "Yusuf", "Erik", "Mateo", "Liam")] + \
        [(n, "f") for n in ("Anna", "Mia", "Sara", "Lena", "Zoe", "Aisha", "Mei", "Nina", "Rosa", "Emma",
                            "Priya", "Ella", "Ruth", "Julia", "Chloe", "Ingrid", "Fatima", "Clara", "Hana",
                            "Kate")]


class Event(NamedTuple):
    """Something that happens to the running total: total op n. One with `ask` ends the story."""
    op: str
    texts: tuple[str, ...]
    phrase: str
    ask: str = ""


class Story(NamedTuple):
    """A running total. packs are starts of the form k * m: (text, phrase)."""
    words: dict[str, tuple[str, ...]]
    starts: tuple[str, ...]
    packs: tuple[tuple[str, str], ...]
    events: tuple[Event, ...]
    finals: tuple[Event, ...]
    state: str
    asks: tuple[str, ...]


class Formula(NamedTuple):
    """Ranges of variables, texts, questions, and steps as ("a op b", phrase); r1, r2 are earlier results."""
    words: dict[str, tuple[str, ...]]
    ranges: dict[str, tuple[int, int]]
    texts: tuple[str, ...]
    asks: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]


def _more(*texts: str, by: str) -> Event:
    return Event("+", texts, f"after {by}, {{state}}")


def _less(*texts: str, by: str) -> Event:
    return Event("-", texts, f"after {by}, {{state}}")


def _owned(things: tuple[str, ...], pack: tuple[str, ...], starts: tuple[str, ...], more: tuple[Event, ...],
           less: tuple[Event, ...], finals: tuple[Event, ...]) -> Story:
    """A story about things that A has."""
    return Story(
        {"things": things, "pack": pack}, starts,
        (("{A} has {k} {pack} with {m} {things} in each.", "{k} {pack} of {m} make {eq} {things}"),
         ("{A} buys {k} {pack}, and each holds {m} {things}.", "{A} starts with {eq} {things}"),
         ("there are {m} {things} in each of the {k} {pack} that {A} brings.", "{A} brings {eq} {things}")),
        more + less, finals, "{A} has {eq} {things}",
        ("how many {things} does {A} have now?", "how many {things} does {A} have at the end?",
         "find the number of {things} that {A} has now."))


SHARE = Event("/", ("{he} shares all of them equally among {n} friends.", "{he} splits all of them evenly "
                    "between {n} children."), "each of the {n} gets {eq} {things}",
              "how many {things} does each of them get?")
BAGS = Event("/", ("{he} puts all of them into {n} bags, the same number in each.",
                   "{he} packs all of them evenly into {n} bags."), "each bag holds {eq} {things}",
             "how many {things} are in one bag?")
GROUPS = Event("/", ("{he} packs all of them in groups of {n}.", "{he} ties all of them into sets of {n}."),
               "{A} makes {eq} groups", "how many groups does {A} make?")
SELL = Event("*", ("{he} sells all of them for ${n} each.", "{he} sells them for {n} dollars each."),
             "{A} earns {eq} dollars", "how many dollars does {A} earn?")
GIFT = _more("{B} gives {A} {n} more.", "{A} gets {n} more from {B}.", by="getting {n} from {B}")
BUY = _more("{he} buys {n} more.", "{A} buys {n} more at the shop.", by="buying {n} more")
FIND = _more("{he} finds {n} more.", "{A} finds another {n}.", by="finding {n} more")
GIVE = _less("{he} gives {n} to {B}.", "{A} gives {B} {n} of them.", "{A} lets {B} have {n}.",
             by="giving {n} to {B}")
LOSE = _less("{he} loses {n} of them.", "{n} of them get lost.", by="losing {n}")
EAT = _less("{he} eats {n} of them.", "{A} and {B} eat {n} of them.", by="eating {n}")
SOLD = _less("{he} sells {n} of them.", "{A} sells {n} to {B}.", by="selling {n}")
BROKE = _less("{n} of them break.", "{he} drops {n} and they break.", by="{n} break")

STORIES: list[Story] = [
    _owned(("apples", "pears", "oranges", "peaches", "plums", "lemons"), ("bags", "baskets", "boxes"),
           ("{A} has {n} {things}.", "{A} picks {n} {things} in the garden.",
            "there are {n} {things} in {A}'s kitchen."),
           (GIFT, BUY), (GIVE, EAT), (SHARE, BAGS, SELL)),
    _owned(("marbles", "stickers", "cards", "stamps", "buttons"), ("packs", "boxes", "bags"),
           ("{A} has {n} {things}.", "{A} starts the day with {n} {things}.", "{A} owns {n} {things}."),
           (GIFT, FIND, BUY), (GIVE, LOSE), (SHARE, GROUPS)),
    _owned(("pencils", "markers", "pens", "crayons", "erasers"), ("packs", "boxes", "cups"),
           ("{A} has {n} {things} for class.", "a teacher gives {A} {n} {things}.",
            "{A} keeps {n} {things} in a drawer."),
           (BUY, GIFT), (GIVE, LOSE), (SHARE, BAGS)),
    _owned(("muffins", "cookies", "cupcakes", "rolls", "pies"), ("trays", "boxes", "plates"),
           ("{A} bakes {n} {things}.", "{A} makes {n} {things} for a party.",
            "{A} takes {n} {things} out of the oven."),
           (_more("{he} bakes {n} more.", "{A} makes another {n}.", by="baking {n} more"), GIFT),
           (EAT, SOLD, GIVE), (SELL, SHARE, BAGS)),
    _owned(("eggs", "tomatoes", "carrots", "onions"), ("cartons", "crates", "baskets"),
           ("{A} collects {n} {things} on the farm.", "{A} has {n} {things} to sell.",
            "{A} gathers {n} {things} at dawn."),
           (_more("{he} collects {n} more.", "{A} gathers another {n} by noon.", by="collecting {n} more"),),
           (SOLD, BROKE, GIVE), (SELL, BAGS)),
    _owned(("shells", "stones", "leaves", "feathers"), ("jars", "buckets", "boxes"),
           ("{A} finds {n} {things} on a walk.", "{A} has collected {n} {things}.",
            "{A} brings home {n} {things}."),
           (FIND, GIFT), (LOSE, GIVE), (SHARE, GROUPS)),
    _owned(("roses", "tulips", "daisies", "lilies"), ("bunches", "vases", "pots"),
           ("{A} picks {n} {things}.", "{A} has {n} {things}.", "{A} cuts {n} {things} in the garden."),
           (_more("{he} picks {n} more.", "{A} cuts another {n}.", by="picking {n} more"), BUY),
           (GIVE, SOLD), (GROUPS, SELL)),
    _owned(("cups", "bowls", "plates", "glasses"), ("sets", "crates", "boxes"),
           ("{A} has {n} {things} in a shop.", "{A} washes {n} {things}.",
            "a cafe owned by {A} has {n} {things}."),
           (BUY,), (BROKE, SOLD), (SELL, GROUPS)),
    _owned(("beads", "ribbons", "pins"), ("strings", "boxes", "packs"),
           ("{A} has {n} {things} for making gifts.", "{A} sorts {n} {things}."),
           (FIND, BUY), (LOSE, GIVE), (BAGS, GROUPS)),
    Story({"bus": ("bus", "train", "tram", "boat")},
          ("a {bus} leaves with {n} people.", "there are {n} people on a {bus}."),
          (("a {bus} has {k} rows with {m} people in each.", "the {bus} starts with {eq} people"),),
          (_more("{n} people get on.", "{n} more people board the {bus}.", by="{n} people get on"),
           _less("{n} people get off.", "{n} people leave at the next stop.", by="{n} people get off")),
          (), "there are {eq} people on the {bus}",
          ("how many people are on the {bus} now?", "how many people are left on the {bus}?")),
    Story({"lot": ("parking lot", "garage", "car park")},
          ("there are {n} cars in a {lot}.", "a {lot} holds {n} cars."),
          (("a {lot} has {k} rows of {m} cars.", "the rows hold {eq} cars"),),
          (_more("{n} cars drive in.", "{n} more cars arrive.", by="{n} cars arrive"),
           _less("{n} cars drive away.", "{n} of the cars leave.", by="{n} cars leave")),
          (), "there are {eq} cars",
          ("how many cars are there now?", "how many cars are in the {lot} at the end?")),
    Story({"pond": ("pond", "lake", "park"), "ducks": ("ducks", "birds", "geese", "frogs")},
          ("there are {n} {ducks} at a {pond}.", "{A} counts {n} {ducks} at the {pond}."),
          (("{k} groups of {m} {ducks} rest at a {pond}.", "the groups have {eq} {ducks}"),),
          (_more("{n} more {ducks} come.", "{n} {ducks} join them.", by="{n} come"),
           _less("{n} of the {ducks} go away.", "{n} {ducks} leave.", by="{n} leave")),
          (), "there are {eq} {ducks}",
          ("how many {ducks} are at the {pond} now?", "how many {ducks} remain?")),
    Story({}, ("{A} has {n} dollars.", "{A} has saved ${n}.", "there are {n} dollars in {A}'s wallet."),
          (("{A} works {k} hours for ${m} an hour.", "{A} earns {eq} dollars"),
           ("{A} saves ${m} a week for {k} weeks.", "{A} saves {eq} dollars")),
          (_more("{he} earns ${n} more.", "{B} gives {A} ${n}.", "{A} gets {n} dollars from {his} aunt.",
                 by="getting ${n}"),
           _less("{he} spends ${n} on lunch.", "{A} buys a book for ${n}.", "{A} pays {n} dollars for a toy.",
                 by="paying ${n}")),
          (Event("/", ("{he} splits the money equally with the family, so that {n} people get the same.",
                       "the money is shared evenly by {n} people."), "each person gets {eq} dollars",
                 "how many dollars does each person get?"),),
          "{A} has {eq} dollars",
          ("how many dollars does {A} have now?", "how much money in dollars does {A} have left?")),
    Story({"game": ("game", "match", "quiz")},
          ("{A} has {n} points in a {game}.", "{A} scores {n} points in a {game}."),
          (("{A} wins {k} rounds of a {game} and gets {m} points each time.", "{A} gets {eq} points"),),
          (_more("{he} scores {n} more.", "{A} wins {n} points.", by="winning {n} points"),
           _less("{he} loses {n} points.", "a mistake costs {A} {n} points.", by="losing {n} points")),
          (Event("*", ("in the bonus round, {his} score is multiplied by {n}.",
                       "{A} then ends up with {n} times that score."),
                 "the score becomes {eq} points", "what is the score of {A} now?"),),
          "{A} has {eq} points", ("how many points does {A} have now?", "what is {A}'s score?")),
    Story({},
          ("a shelf holds {n} books.", "{A} has {n} books on a shelf.", "a small library owns {n} books."),
          (("a library has {k} shelves with {m} books on each.", "the shelves hold {eq} books"),),
          (_more("{A} brings {n} more books.", "{n} new books arrive.", by="{n} books arrive"),
           _less("{B} borrows {n} books.", "{n} books are taken away.", by="{n} books are taken")),
          (Event("/", ("all the books are moved to {n} new shelves, the same number on each.",
                       "the books are packed evenly in {n} boxes."), "each part has {eq} books",
                 "how many books are in each part?"),),
          "there are {eq} books", ("how many books are there now?", "how many books are there in the end?")),
    Story({}, ("a tank holds {n} liters of water.", "there are {n} liters of water in a barrel."),
          (("{A} pours {k} buckets of {m} liters into an empty tank.", "the buckets hold {eq} liters"),),
          (_more("{A} adds {n} liters.", "{n} liters of rain fall in.", by="adding {n} liters"),
           _less("{A} uses {n} liters.", "{n} liters leak out.", by="losing {n} liters")),
          (Event("/", ("all the water is poured into cans of {n} liters each.",), "{eq} cans are filled",
                 "how many cans are filled?"),),
          "there are {eq} liters", ("how many liters are there now?", "how many liters of water are left?")),
]

MORE = {"things": ("apples", "cards", "books", "coins", "shells", "stickers", "balls")}
FORMULAS: list[Formula] = [
    Formula(MORE, {"a": (3, 20), "b": (2, 20)},
            ("{A} has {a} {things}. {B} has {b} more than {A}.",
             "{A} owns {a} {things}, and {B} owns {b} more {things} than {A}."),
            ("how many {things} does {B} have?",), (("a + b", "{B} has {eq} {things}"),)),
    Formula(MORE, {"a": (8, 40), "b": (2, 20)},
            ("{A} has {a} {things}. {B} has {b} fewer than {A}.",
             "{B} has {b} fewer {things} than {A}, who has {a}."),
            ("how many {things} does {B} have?",), (("a - b", "{B} has {eq} {things}"),)),
    Formula(MORE, {"a": (2, 15), "b": (2, 5)},
            ("{A} has {a} {things}. {B} has {b} times as many.",
             "{B} has {b} times as many {things} as {A}, who has {a}."),
            ("how many {things} does {B} have?",), (("a * b", "{B} has {eq} {things}"),)),
    Formula({}, {"a": (2, 9), "b": (2, 12)},
            ("a rectangle is {a} cm wide and {b} cm long.",
             "{A} draws a rectangle with sides of {a} cm and {b} cm."),
            ("what is its area in square cm?", "find its area in square cm."),
            (("a * b", "the area is {eq} square cm"),)),
    Formula({"way": ("walks", "rides", "runs")}, {"a": (2, 12), "b": (2, 8)},
            ("{A} {way} {a} km an hour for {b} hours.", "for {b} hours {A} {way} at {a} km an hour."),
            ("how many km does {A} go?", "how far does {A} get, in km?"), (("a * b", "{A} goes {eq} km"),)),
    Formula({"group": ("teams", "groups", "rows")}, {"a": (6, 60), "b": (2, 10)},
            ("{a} children form {b} equal {group}.",
             "a class of {a} children is split into {b} equal {group}."),
            ("how many children are in one of the {group}?",), (("a / b", "each has {eq} children"),)),
    Formula(MORE, {"a": (3, 20), "b": (2, 15)},
            ("{A} has {a} {things}. {B} has {b} more than {A}.",
             "{B} has {b} more {things} than {A}. {A} has {a}."),
            ("how many {things} do they have together?", "how many {things} do the two have in total?"),
            (("a + b", "{B} has {eq} {things}"), ("r1 + a", "together they have {eq} {things}"))),
    Formula(MORE, {"a": (2, 12), "b": (2, 5)},
            ("{A} has {a} {things}. {B} has {b} times as many.",
             "{B} has {b} times as many {things} as {A}. {A} has {a}."),
            ("how many {things} do they have together?", "how many {things} do the two have in all?"),
            (("a * b", "{B} has {eq} {things}"), ("r1 + a", "together they have {eq} {things}"))),
    Formula({"item": ("pens", "toys", "books", "hats")}, {"a": (2, 9), "b": (2, 9), "c": (20, 100)},
            ("{A} buys {a} {item} for ${b} each and pays with ${c}.",
             "{A} has ${c} and buys {a} {item} at ${b} each."),
            ("how many dollars does {A} have left?", "how much change in dollars does {A} get?"),
            (("a * b", "the {item} cost {eq} dollars"), ("c - r1", "{A} has {eq} dollars left"))),
    Formula({}, {"a": (2, 15), "b": (2, 15)},
            ("a garden is {a} m long and {b} m wide.", "{A} has a field of {a} m by {b} m."),
            ("how many meters of fence go around it?", "what is the distance around it in meters?"),
            (("a + b", "one long and one short side make {eq} meters"),
             ("r1 * 2", "all four sides make {eq} meters"))),
    Formula({}, {"a": (30, 99), "b": (2, 9), "c": (2, 9)},
            ("a book has {a} pages. {A} reads {b} pages a day for {c} days.",
             "{A} reads {b} pages of a {a} page book on each of {c} days."),
            ("how many pages are left?", "how many pages does {A} still have to read?"),
            (("b * c", "{A} reads {eq} pages"), ("a - r1", "{eq} pages are left"))),
    Formula({}, {"a": (5, 15), "b": (2, 12), "c": (2, 10)},
            ("{A} is {a} years old. {B} is {b} years older.", "{B} is {b} years older than {A}, who is {a}."),
            ("how old will {B} be in {c} years?",),
            (("a + b", "{B} is {eq} years old"), ("r1 + c", "{B} will be {eq}"))),
    Formula({}, {"a": (2, 9), "b": (2, 9)},
            ("a farm has {a} cows and {b} hens.", "{A} sees {a} cows and {b} hens."),
            ("how many legs do they have in all?",),
            (("a * 4", "the cows have {eq} legs"), ("b * 2", "the hens have {eq} legs"),
             ("r1 + r2", "they have {eq} legs in all"))),
    Formula({"x": ("pens", "cakes", "hats"), "y": ("books", "bags", "balls")},
            {"a": (2, 8), "b": (2, 8), "c": (2, 8), "d": (2, 8)},
            ("{A} buys {a} {x} for ${b} each and {c} {y} for ${d} each.",
             "{x} cost ${b} and {y} cost ${d}. {A} buys {a} {x} and {c} {y}."),
            ("how many dollars does {A} pay?", "what is the total price in dollars?"),
            (("a * b", "the {x} cost {eq} dollars"), ("c * d", "the {y} cost {eq} dollars"),
             ("r1 + r2", "{A} pays {eq} dollars"))),
    Formula({}, {"a": (2, 8), "b": (2, 9), "c": (2, 20), "d": (2, 20)},
            ("{A} works {a} hours a day for {b} days, then {c} hours on Saturday. "
             "{A} rests for {d} hours of that time.",),
            ("how many hours does {A} really work?",),
            (("a * b", "{A} works {eq} hours on the weekdays"),
             ("r1 + c", "with Saturday that is {eq} hours"),
             ("r2 - d", "{A} really works {eq} hours"))),
    Formula(MORE, {"a": (3, 15), "b": (2, 10), "c": (2, 4)},
            ("{A} has {a} {things}, and {B} has {b} more than {A}. "
             "They share all of them equally with friends, {c} people in all.",),
            ("how many {things} does each person get?",),
            (("a + b", "{B} has {eq} {things}"), ("r1 + a", "together they have {eq} {things}"),
             ("r2 / c", "each of the {c} people gets {eq} {things}"))),
]
