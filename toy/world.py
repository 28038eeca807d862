"""The toy world: the smallest task that needs everything a spoken chatbot needs. A user asks, the model
answers:

    repeat cat down house        -> cat down house          hear anything, say anything
    what comes after six         -> seven                   know something
    opposite of left             -> right
    count from three to seven    -> three four ... seven    a long answer
    chant cat down house         -> five times those        a longer one, good to interrupt

or tells a story, clause by clause: the model gives backchannels in between, and warns at once if something is
on fire. All of this is in English, in Mandarin (从 三 数到 七), or in both.

27 of the 30 English words are in Speech Commands, recordings of single words by 2,600 people
(corpora/words.py); the others are ten, eleven and twelve.

Held out, never trained on: a fifth of all word triples, a sixth of all number pairs, and two of the user
voices.
Besides the dialogues there are sentences (words in any order, said by a user or the model), as lines of one
turn. They take the place of the audio books of the paper's post-training.
"""
import hashlib
import random
from dataclasses import dataclass

# Voice variants of espeak-ng that sound like people, klatt to klatt6 by another method; without those with
# breath, whose noise is never the same.
VARIANTS = """m1 m2 m3 m4 m5 m6 m7 m8 f1 f4 klatt klatt2 klatt3 klatt4 klatt5 klatt6 Alex Andrea Andy
    Annie AnxiousAndy Gene Gene2 Jacky Lee Marco Mario Michael Mike adam anika announcer antonio aunty
    belinda benjamin boris david ed edward edward2 grandma grandpa gustave ian iven iven2 iven3 john
    kaukovalta linda marcelo max michel miguel mike2 norbert pablo paul pedro quincy rob robert shelby
    steph steph2 steph3 travis zac""".split()
NEW_VARIANTS = ("f1", "m7")  # heard only in tests
CRASHES = ("cmn+rob",)  # espeak-ng dies at one in a hundred of what it says in it
# Voices made from recordings of people, of synthesisers that a machine may have (toy/voices.py). flite's awb
# and slt, and slt of any other, are never trained on: they are the strangers of evals/strangers.py.
OTHER_VOICES = """flite:kal flite:kal16 flite:rms pico:en-US pico:en-GB rhvoice:alan rhvoice:bdl rhvoice:clb
    rhvoice:evgeniy-eng rhvoice:lyubov mbrola:us1 mbrola:us2 mbrola:us3 mbrola:en1 mbrola:af1-en
    mbrola:de4-en mbrola:de5-en mbrola:de6-en mbrola:fr1-en mbrola:fr4-en mbrola:hu1-en mbrola:nl2-en
    mbrola:pl1-en mbrola:ro1-en mbrola:sw1-en mbrola:sw2-en""".split()
KIND_PROPORTIONS = {"repeat": 0.38, "count": 0.3, "next": 0.08, "opposite": 0.08, "chant": 0.1, "story": 0.06}
CHANT_REPEATS = 5  # an answer of six seconds


class Language:
    """What is said in one language, with a space between any two words, and the voices of espeak-ng that say
    it."""

    def __init__(self, numbers, opposites, others, requests, story, accents, model_voice, new_voices,
                 other_voices=()):
        self.numbers = numbers.split()
        self.opposites = dict(pair.split("/") for pair in opposites.split())
        self.opposites |= {b: a for a, b in self.opposites.items()}
        self.words = self.numbers + list(self.opposites) + others.split()  # 30
        self.requests = dict(zip(KIND_PROPORTIONS, requests))  # all but the story
        self.function_words = list(dict.fromkeys(w for r in requests for w in r.split() if "{" not in w))
        self.story = story
        self.accents, self.model_voice = accents.split(), model_voice
        self.new_voices = new_voices.split()  # heard only in tests
        self.other_voices = other_voices  # of other synthesisers than espeak-ng, if they are installed

    def user_voices(self, n, seed):
        """n voices of espeak-ng: accents with variants, shuffled, without the model's voice, the
        variants of the new ones, and those that crash."""
        voices = [f"{a}+{v}" for v in VARIANTS if v not in NEW_VARIANTS for a in self.accents]
        voices = [voice for voice in voices if voice not in (self.model_voice, *CRASHES)]
        random.Random(seed).shuffle(voices)
        return voices[:n]


@dataclass(frozen=True)
class Story:
    """A user's long story: clauses with pauses between them. In a pause the model gives a backchannel; at a
    hazard it warns at once."""
    begin: str
    clause: str
    nouns: str
    adjectives: str
    hazard: str
    end: str
    reply: str
    warning: str
    model_backchannel: str
    user_backchannels: tuple  # what a user says while the model speaks, which must not stop it


LANGUAGES = {
    "en": Language("zero one two three four five six seven eight nine ten eleven twelve",
                   "left/right up/down on/off yes/no stop/go forward/backward",
                   "cat dog bird tree house",
                   ["repeat {}", "count from {} to {}", "what comes after {}", "opposite of {}", "chant {}"],
                   Story("listen", "the {} is {}", "cat dog bird tree house bed",
                         "happy big small hot cold red", "the {} is on fire", "the end", "nice story",
                         "watch out there is a fire", "mhm", ("mhm", "yeah", "okay")),
                   "en-us en-gb-x-rp gmw/en en-gb-scotland en-us-nyc en-gb-x-gbcwmd en-gb-x-gbclan en-029",
                   "en-us+m3", "en-us+f1 en-gb-x-rp+m7", OTHER_VOICES),
    "zh": Language("零 一 二 三 四 五 六 七 八 九 十 十一 十二",
                   "大/小 热/冷 左/右 白天/黑夜 上/下", "红 猫 狗 太阳 月亮 树 苹果",
                   ["重复 {}", "从 {} 数到 {}", "{} 后面 是 什么", "{} 的 反义词", "反复 说 {}"],
                   Story("听 我 说", "{} 很 {}", "猫 鱼 太阳 月亮 树 苹果", "大 小 热 冷 红 绿",
                         "{} 着火 了", "讲 完 了", "好 故事", "小心 那里 着火 了 快 走", "嗯", ("嗯", "对", "好")),
                   "cmn", "cmn+m3", "cmn+f1 cmn+m7"),
}

RING = random.Random(13).sample(range(13), 13)
# 13 of 78 number pairs: each number is in two of them.
HELD_OUT_PAIRS = {frozenset(pair) for pair in zip(RING, RING[1:] + RING[:1])}


def held_out_triple(words):
    """Whether these three words, in this order, are in the fifth that is never trained on."""
    return hashlib.sha256(" ".join(words).encode()).digest()[0] < 51


def make_request(lang, kind, test, rng, known=()):
    """(request, answer). For a test it is held out, if the kind has held-out ones. known: words to repeat,
    at least three of lang.words (default: all)."""
    numbers, request, known = lang.numbers, lang.requests[kind].format, known or lang.words
    while True:
        if kind in ("repeat", "chant"):
            words = rng.sample(known, 3)
            if held_out_triple(words) == test:
                return request(" ".join(words)), " ".join(words * (CHANT_REPEATS if kind == "chant" else 1))
        elif kind == "count":
            a, b = rng.sample(range(len(numbers)), 2)
            if (frozenset((a, b)) in HELD_OUT_PAIRS) == test:
                counted = numbers[a:b + 1] if a < b else numbers[b:a + 1][::-1]
                return request(numbers[a], numbers[b]), " ".join(counted)
        elif kind == "next":
            i = rng.randrange(len(numbers) - 1)
            return request(numbers[i]), numbers[i + 1]
        else:
            word = rng.choice(sorted(lang.opposites.keys() & set(known)) or sorted(lang.opposites))
            return request(word), lang.opposites[word]


def cut_in_two(request, rng):
    """The two parts of a request with a pause in between, at any word."""
    words = request.split()
    cut = rng.randrange(1, len(words))
    return [" ".join(words[:cut]), " ".join(words[cut:])]


def make_story(lang, clauses, hazard, rng):
    """The parts of a story with this number of clauses. hazard: the number of the clause that is a hazard, or
    None."""
    s, parts = lang.story, [lang.story.begin]
    for i in range(clauses):
        noun, adjective = rng.choice(s.nouns.split()), rng.choice(s.adjectives.split())
        parts.append(s.hazard.format(noun) if i == hazard else s.clause.format(noun, adjective))
    return [*parts, s.end]


def make_sentence(lang, vocabulary, rng):
    """One to four words in any order, for post-training. The next word cannot be guessed from the text, so a
    model that transcribes it must hear every word. Nothing that is held out occurs in it."""
    while True:
        words = [rng.choice(vocabulary) for _ in range(rng.randint(1, 4))]
        numbers = [lang.numbers.index(w) for w in words if w in lang.numbers]
        if not any(held_out_triple(words[i:i + 3]) for i in range(len(words) - 2)) and \
                not any(frozenset((a, b)) in HELD_OUT_PAIRS for a in numbers for b in numbers):
            return " ".join(words)
