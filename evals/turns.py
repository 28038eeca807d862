"""Turn-taking: FLEXI's scenarios, and how a system's audio is scored on them.

A system is judged by where there is speech in its audio. A stretch of speech shorter than a second is a
backchannel, a longer one takes the turn. The published definitions leave cases open; the comments say how
they are decided here.

    one frame   [ user's audio, 80 ms ] -> system -> [ its audio, 80 ms ] on the same clock

    ScenarioMaker --speaks--> Item --run--> Reply --score--> proportions, seconds
                         (user's audio)  (system's speech)

eval.py runs them on our models. Recordings of any other system are read from a folder (conversations.py).
"""
import dataclasses
import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy.voices
from files.audio import SAMPLE_RATE
from toy.world import LANGUAGES, cut_in_two, make_request, make_story

LEAD = 1.0  # seconds of silence before the user speaks


def speech(x, floor=-45.0, bridge=0.3, least=0.1):
    """Voice activity in x (N,): [(begin, end), ...] in seconds, from the energy of 20 ms windows in dB. Gaps
    shorter than `bridge` are closed, then bursts shorter than `least` are dropped."""
    n = SAMPLE_RATE // 50
    loud = 20 * torch.log10(F.pad(x, (0, -len(x) % n)).view(-1, n).square().mean(1).sqrt() + 1e-6) > floor
    spans = []
    for i in loud.nonzero()[:, 0].tolist():
        if spans and i / 50 - spans[-1][1] < bridge:
            spans[-1][1] = (i + 1) / 50
        else:
            spans.append([i / 50, (i + 1) / 50])
    return [(a, b) for a, b in spans if b - a >= least]


def yields(heard, said):
    """Seconds at which the model fell silent at most a second after the user had begun to speak."""
    users = speech(heard)
    return [end for begin, end in speech(said) if any(begin < b < end <= b + 1.0 for b, _ in users)]


def silence(seconds):
    return torch.zeros(round(seconds * SAMPLE_RATE))


def words_of(pieces):
    return "".join(text for _, text in pieces).split()


# ------------------------------------------------------------------------------------------------------------
# what the user says. Times are in seconds on the clock of the recording.

TAIL = 10.0  # seconds of silence after what the user says


@dataclass
class Item:
    """What a system is to hear, and what happens in it."""
    name: str
    scenario: str
    audio: torch.Tensor  # (N,)
    end: float  # of what the user says
    answer: str = None  # the right answer to it
    pause: tuple = None  # (begin, end) of the pause inside a request
    event: tuple = None  # (begin, end) of an interruption or a backchannel
    clauses: tuple = ()  # where the clauses of a story end
    control: str = None  # name of the same item without the event or the hazard


class ScenarioMaker:
    """Makes the items: held-out requests, stories and backchannels, spoken by the toy world's synthesiser
    or by --tts."""

    def __init__(self, dialogues, tts, seed, voices=None):
        """voices: English ones, instead of those of the dialogues."""
        self.voices = {"en": set(voices)} if voices else {}  # language -> the users' voices
        for d in dialogues if not voices else ():
            if d["split"] == "seen" and d.get("lang") in LANGUAGES and d["turns"][0]["role"] == "user":
                self.voices.setdefault(d["lang"], set()).add(d["turns"][0]["voice"])
        if not self.voices:
            raise ValueError("the scenarios need the toy world's manifest: --data")
        self.rng, self.synthesiser = random.Random(seed), toy.voices.get_synthesiser(tts)
        self.count = Counter()

    def pick_voice(self):
        """(a language, one of its voices)"""
        code = self.rng.choice(sorted(self.voices))
        return LANGUAGES[code], self.rng.choice(sorted(self.voices[code]))

    def item(self, scenario, voice, parts, pauses=(), **facts):
        """The parts, spoken with pauses between them, and when each one ends: (Item, [seconds, ...])."""
        audio, ends = toy.voices.speak(self.synthesiser, parts, pauses, voice)
        audio = torch.cat([silence(LEAD), torch.from_numpy(audio), silence(TAIL)])
        ends = [LEAD + end for end in ends]
        self.count[scenario] += 1
        name = f"{scenario.replace(' ', '-')}-{self.count[scenario]:03d}"
        return Item(name, scenario, audio, ends[-1], **facts), ends

    def request(self, scenario, *kinds):
        """A request whose answer has at least three words; a shorter answer could be taken for a
        backchannel."""
        (lang, voice), answer = self.pick_voice(), ""
        while len(answer.split()) < 3:
            kind = self.rng.choice(kinds or ["repeat", "count"])
            request, answer = make_request(lang, kind, True, self.rng)
        return self.item(scenario, voice, [request], answer=answer)[0]

    def interruption(self, scenario):
        """A request of at least a second and a half: while a shorter one lasts, the system cannot be silent
        for the second that counts as silence. Of a voice that is too quick for it, the longest of twenty."""
        items = [self.request(scenario)]
        while items[-1].end - LEAD < 1.5 and len(items) < 20:
            items.append(self.request(scenario))
        return max(items, key=lambda item: item.end)

    def hesitation(self, scenario, low, high):
        lang, voice = self.pick_voice()
        request, answer = make_request(lang, self.rng.choice(["repeat", "count"]), True, self.rng)
        pause = self.rng.uniform(low, high)
        item, ends = self.item(scenario, voice, cut_in_two(request, self.rng), [pause], answer=answer)
        item.pause = ends[0], ends[0] + pause
        return item

    def backchannel(self, scenario):
        lang, voice = self.pick_voice()
        return self.item(scenario, voice, [self.rng.choice(lang.story.user_backchannels)])[0]

    def story(self, scenario):
        lang, voice = self.pick_voice()
        parts = make_story(lang, 11, None, self.rng)  # 48 words in English
        item, ends = self.item(scenario, voice, parts, [0.4] * (len(parts) - 1))
        item.clauses = tuple(ends[1:-1])
        return item

    def hazard(self):
        """(a story in which something is on fire, its control: the same in which nothing is)"""
        (lang, voice), where, seed = self.pick_voice(), self.rng.choice([1, 2]), self.rng.random()
        stories = [make_story(lang, 9, hazard, random.Random(seed)) for hazard in (where, None)]
        alarm, calm = (self.item(scenario, voice, parts, [0.4] * (len(parts) - 1))[0]
                       for scenario, parts in zip(("model interrupt", "control"), stories))
        alarm.control = calm.name
        return alarm, calm


def barge_in(item, reply, other):
    """The item once more, but two seconds after the system began to answer, the user says what is said in
    `other`. None if the system did not answer."""
    onsets = [a for a, b in reply.spans if b > item.end]
    if not onsets:
        return None
    begin = round((max(onsets[0], item.end) + 2.0) * SAMPLE_RATE)
    said = other.audio[round(LEAD * SAMPLE_RATE):]  # and the silence after it
    end = begin / SAMPLE_RATE + other.end - LEAD
    before = F.pad(item.audio, (0, max(0, begin - len(item.audio))))[:begin]
    return dataclasses.replace(other, audio=torch.cat([before, said]), end=end,
                               event=(begin / SAMPLE_RATE, end), control=item.name)


def run_scenarios(run, maker, n):
    """n items of each scenario, run through a system by run([items, ...], description) -> [replies, ...], so
    that several scenarios may run at once. Returns [(Item, Reply), ...]."""
    def build(what, f, *args):
        return [f(*args) for _ in tqdm(range(n), f"speaking: {what}", unit="item", leave=False)]
    groups = [build("turn-taking", maker.request, "turn-taking"),
              build("pause", maker.hesitation, "pause", 0.64, 0.89),
              build("long pause", maker.hesitation, "long pause", 1.5, 1.5),
              build("model backchannel", maker.story, "model backchannel"),
              *zip(*build("model interrupt", maker.hazard)),
              build("long answers", maker.request, "control", "chant")]
    # Two passes: only after the first is it known when the system speaks. The second equals it up to the
    # event.
    replies = run(groups, "scenarios")
    long, alone = groups[-1], replies[-1]
    out = [pair for items, said in zip(groups, replies) for pair in zip(items, said)]
    groups = []
    for scenario, make in (("user interrupt", maker.interruption), ("user backchannel", maker.backchannel)):
        others = build(scenario, make, scenario)
        # a batch of the same size, so that nothing but the event differs
        groups.append([barge_in(*x) or x[0] for x in zip(long, alone, others)])
    for items, said in zip(groups, run(groups, "scenarios with an event")):
        out += [(item, reply) for item, reply in zip(items, said) if item.event]
    return out


# ------------------------------------------------------------------------------------------------------------
# what the system says, and its scores


@dataclass
class Reply:
    """What a system said during an item."""
    spans: list  # of speech: [(begin, end), ...]
    written: list = None  # its monologue: [(second, text), ...]; None if unknown

    def words(self, span):
        """The number of words written for a stretch of speech, up to half a second before their audio."""
        return len(words_of(p for p in self.written if span[0] - 0.5 <= p[0] < span[1]))

    def is_backchannel(self, span):
        return span[1] - span[0] < 1.0 and (self.written is None or self.words(span) <= 2)

    def turns(self):
        """The stretches of speech that take the turn."""
        return [s for s in self.spans if not self.is_backchannel(s)]

    def silences(self):
        """[(begin, end), ...] around its stretches of speech; the last one is endless."""
        edges = [0.0, *(t for s in self.spans for t in s), math.inf]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]

    def answered(self, item):
        return words_of(p for p in self.written if p[0] > item.end - 0.1) == item.answer.split()


def earliest(times):
    return min(times, default=None)


def score_turn_taking(item, reply, control):
    onset = earliest(a for a, _ in reply.spans if a >= item.end)
    return {"TOR": bool(reply.turns()), "JIR": any(a < item.end for a, _ in reply.spans),
            "latency": onset and onset - item.end}


def score_pause(item, reply, control):
    begin = item.pause[0]
    return {"TOR": any(a < item.end and b > begin for a, b in reply.turns()),
            "TOR as FLEXI counts": any(begin <= a < item.end for a, _ in reply.turns())}


def speaks_on(item, control):
    """Whether the system would still speak three seconds after the event begins, as in the control: only
    then is there anything to stop. An item without a control counts."""
    begin = item.event[0]
    return control is None or any(a <= begin and b >= begin + 3.0 for a, b in control.spans)


def score_user_interrupt(item, reply, control):
    if not speaks_on(item, control):
        return {"eligible": False}
    begin, end = item.event
    silences = [(max(a, begin), b) for a, b in reply.silences() if a <= begin + 3.0]
    stop = earliest(a for a, b in silences if b - a >= 1.0)
    answer = earliest(a for a, _ in reply.spans if a >= end) if stop else None
    return {"eligible": True, "TTR": stop is not None, "stop latency": stop and stop - begin,
            "silent within 1 s": stop is not None and stop - begin <= 1.0,
            "response latency": answer and answer - end,
            "overlap (FLEXI's latency)": sum(max(0.0, min(b, end) - max(a, begin)) for a, b in reply.spans)}


def score_user_backchannel(item, reply, control):
    if not speaks_on(item, control):
        return {"eligible": False}
    begin, end = item.event
    stopped = any(begin <= a <= end + 1.5 and b - a >= 1.5 for a, b in reply.silences())
    return {"eligible": True, "TTR": stopped}


def score_model_interrupt(item, reply, control):
    early = lambda reply, item: any(a < item.end - 0.5 for a, _ in reply.turns())
    return {"TOR": early(reply, item)} | ({"control TOR": early(control, item)} if control else {})


def score_model_backchannel(item, reply, control):
    onsets = [s[0] for s in reply.spans if s[0] < item.end and reply.is_backchannel(s)]
    last = item.clauses[-1] if item.clauses else item.end
    row = {"TOR": any(a < last for a, _ in reply.turns()), "BCR": len(onsets) / item.end}
    return row | ({"JSD": jensen_shannon(onsets, item.clauses, item.end)} if item.clauses else {})


def jensen_shannon(found, right, end, width=0.2):
    """Divergence, base 2, of two sets of times as histograms: 0 if equal, 1 if disjoint."""
    if not found or not right:
        return 1.0
    n = math.ceil(end / width)
    bins = lambda times: torch.tensor([min(n - 1, int(t / width + 1e-6)) for t in times])
    p, q = (torch.bincount(bins(times), minlength=n).double() / len(times) for times in (found, right))
    entropy = lambda x: -(x[x > 0] * x[x > 0].log2()).sum().item()
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


SCORES = {"turn-taking": score_turn_taking, "pause": score_pause, "long pause": score_pause,
          "user interrupt": score_user_interrupt, "model interrupt": score_model_interrupt,
          "user backchannel": score_user_backchannel, "model backchannel": score_model_backchannel,
          # of Full-Duplex-Bench v1.5: nothing that the model should stop for
          "talking to other": score_user_backchannel, "background speech": score_user_backchannel}


def score_all(conversations):
    """[(Item, Reply), ...] -> {scenario: {measure: {"value", "n", ...}}}: proportions with their 95%
    interval, medians of latencies, means of other numbers."""
    replies = {item.name: reply for item, reply in conversations}
    table = {}
    for scenario, score in SCORES.items():
        columns = {}
        for item, reply in conversations:
            if item.scenario == scenario:
                row = score(item, reply, replies.get(item.control))
                if row.get("eligible", True) and item.answer and reply.written is not None:
                    row["answered"] = reply.answered(item)
                for name, value in row.items():
                    columns.setdefault(name, []).append(value)
        table[scenario] = found = {name: summary(name, values) for name, values in columns.items()}
        if "control TOR" in found:
            found["TOR minus control"] = {"value": found["TOR"]["value"] - found["control TOR"]["value"],
                                          "n": found["control TOR"]["n"]}
    return {scenario: columns for scenario, columns in table.items() if columns}


def wilson(hits, n, z=1.96):
    """Wilson's 95% interval of a proportion."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def format_proportion(p, low, high, n):
    return f"{p:.3f} [{low:.2f}, {high:.2f}] of {n}"


def summary(name, values):
    values = [v for v in values if v is not None]
    if not values:
        return {"value": None, "n": 0}
    if isinstance(values[0], bool):
        low, high = wilson(sum(values), len(values))
        return {"value": sum(values) / len(values), "n": len(values), "low": low, "high": high}
    return {"value": statistics.median(values) if "latency" in name else statistics.mean(values),
            "n": len(values)}


# The rows of FLEXI's tables 2 to 4. Its items, voices, recogniser and definitions differ from ours.
COLUMNS = {"TT TOR+": ("turn-taking", "TOR"), "TT lat-": ("turn-taking", "latency"),
           "TT JIR-": ("turn-taking", "JIR"), "PH TOR-": ("pause", "TOR"),
           "UI TTR+": ("user interrupt", "TTR"),
           "UI lat-": ("user interrupt", "stop latency"), "MI TOR+": ("model interrupt", "TOR"),
           "UBC TTR-": ("user backchannel", "TTR"),
           "MBC TOR-": ("model backchannel", "TOR"), "MBC BCR+": ("model backchannel", "BCR"),
           "MBC JSD-": ("model backchannel", "JSD")}
PUBLISHED = {
    "Moshi": (0.995, 0.696, 0.785, 0.550, 0.462, 2.660, 0.390, 0.020, 0.578, 0.031, 0.947),
    "Freeze-Omni": (1.000, 1.147, 0.120, 0.937, 0.539, 1.751, 0.535, 0.086, 0.608, 0.003, 0.986),
    "VITA-1.5": (1.000, 4.878, 0.000, 0.916, 0.226, 4.016, 0.000, 0.000, 0.578, 0.002, 0.986),
    "Gemini-2.5-flash-live": (1.000, 1.736, 0.000, 0.835, 0.935, 1.766, 0.000, 0.031, 0.045, 0.012, 0.981)}


def report_turns(table, name):
    """Prints every measure, then our row above the published ones."""
    for scenario, columns in table.items():
        print(f"\n  {scenario}")
        for measure, column in columns.items():
            print(f"    {measure:28} {format_measure(measure, column)}")
    print(f"\n{'(+ more is better)':22}" + "".join(f"{column:>10}" for column in COLUMNS))
    ours = [table.get(scenario, {}).get(measure, {}).get("value") for scenario, measure in COLUMNS.values()]
    for system, row in ((name, ours), *PUBLISHED.items()):
        print(f"{system:22}" + "".join(f"{'-' if x is None else f'{x:.3f}':>10}" for x in row))
    print("The published rows are of other items, voices, recognisers and definitions: "
          "not comparable item by item.")


def format_measure(measure, c):
    if c["value"] is None:
        return "never"
    if "low" in c:
        return format_proportion(c["value"], c["low"], c["high"], c["n"])
    unit, average = (" s", "median") if "latency" in measure else ("", "mean")
    return f"{c['value']:.3f}{unit}, {average} of {c['n']}"
