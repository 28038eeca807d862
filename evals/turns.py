"""Who has the turn? FLEXI's scenarios, and what a system's channel gets for them.

What a system does is judged by where there is sound on its channel. A stretch of speech shorter than a second is a backchannel, a
longer one takes the turn. The published definitions have holes; these have none that we know.

    one frame   [ user's sound, 80 ms ] -> system -> [ its sound, 80 ms ] on the same clock

    World --speaks--> Item --run--> Reply --score--> shares, seconds
    (who)            (sound in)    (sound out)

eval.py runs them on a model of ours; any other system's recordings are read from a folder.
"""
import dataclasses
import json
import math
import os
import random
import statistics
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy.voices
from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE, read_audio, write_audio
from toy.world import LANGUAGES, cut_in_two, make_request, make_story

LEAD = 1.0  # seconds of silence before the user speaks


def speech(x, floor=-45.0, bridge=0.3, least=0.1):
    """Where there is sound in x (N,): [(begin, end), ...] in seconds, by the energy of 20 ms windows. Gaps shorter than
    `bridge` are closed, then bursts shorter than `least` are dropped."""
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
    """When the model fell silent because the user had begun to speak at most a second before: [seconds, ...]"""
    return [end for begin, end in speech(said) if any(begin < b < end <= b + 1.0 for b, _ in speech(heard))]


def silence(seconds):
    return torch.zeros(round(seconds * SAMPLE_RATE))


def words_of(pieces):
    return "".join(text for _, text in pieces).split()


# ---------------------------------------------------------------------------------------------------------------------
# what is said to the system. Times in seconds on the clock of the recording.

TAIL = 10.0  # seconds of silence after what the user says


@dataclass
class Item:
    """A recording to be held to a system, and what happens in it."""
    name: str
    scenario: str
    sound: torch.Tensor  # (N,)
    end: float  # of what the user says
    answer: str = None  # what shall be answered after that
    pause: tuple = None  # (begin, end) of the pause inside a request
    event: tuple = None  # (begin, end) of an interruption or a backchannel
    clauses: tuple = ()  # where the clauses of a story end
    control: str = None  # name of the item that is the same without the event, without the hazard


class World:
    """Speaks what the scenarios need: held-out requests, stories, backchannels, by the synthesiser of the toy world or --tts."""

    def __init__(self, dialogues, tts, seed):
        self.voices = {}  # language -> the users' voices
        for d in dialogues:
            if d["split"] == "seen" and d.get("lang") in LANGUAGES and d["turns"][0]["role"] == "user":
                self.voices.setdefault(d["lang"], set()).add(d["turns"][0]["voice"])
        if not self.voices:
            raise ValueError("the scenarios need the toy world's manifest: --data")
        self.rng, self.synthesiser = random.Random(seed), toy.voices.get_synthesiser(tts)
        self.count = Counter()

    def someone(self):
        """(a language, the voice of one who speaks it)"""
        code = self.rng.choice(sorted(self.voices))
        return LANGUAGES[code], self.rng.choice(sorted(self.voices[code]))

    def item(self, scenario, voice, parts, pauses=(), **facts):
        """The user says the parts with pauses between them."""
        sound, ends = toy.voices.speak(self.synthesiser, parts, pauses, voice, 165, 50)
        self.count[scenario] += 1
        return Item(f"{scenario.replace(' ', '-')}-{self.count[scenario]:03d}", scenario,
                    torch.cat([silence(LEAD), torch.from_numpy(sound), silence(TAIL)]), LEAD + ends[-1], **facts), \
            [LEAD + e for e in ends]

    def request(self, scenario, *kinds):
        """One whose answer has three words at least: a shorter one could be taken for a backchannel."""
        (lang, voice), answer = self.someone(), ""
        while len(answer.split()) < 3:
            request, answer = make_request(lang, self.rng.choice(kinds or ["repeat", "count"]), True, self.rng)
        return self.item(scenario, voice, [request], answer=answer)[0]

    def hesitation(self, scenario, low, high):
        lang, voice = self.someone()
        request, answer = make_request(lang, self.rng.choice(["repeat", "count"]), True, self.rng)
        pause = self.rng.uniform(low, high)
        item, ends = self.item(scenario, voice, cut_in_two(request, self.rng), [pause], answer=answer)
        item.pause = ends[0], ends[0] + pause
        return item

    def backchannel(self, scenario):
        lang, voice = self.someone()
        return self.item(scenario, voice, [self.rng.choice(lang.story.user_backchannels)])[0]

    def story(self, scenario):
        lang, voice = self.someone()
        parts = make_story(lang, 11, None, self.rng)  # 48 words in English
        item, ends = self.item(scenario, voice, parts, [0.4] * (len(parts) - 1))
        item.clauses = tuple(ends[1:-1])
        return item

    def hazard(self):
        """(a story in which something is on fire, its control: the same in which nothing is)"""
        (lang, voice), where, seed = self.someone(), self.rng.choice([1, 2]), self.rng.random()
        told = [make_story(lang, 9, hazard, random.Random(seed)) for hazard in (where, None)]
        alarm, calm = (self.item(s, voice, parts, [0.4] * (len(parts) - 1))[0] for s, parts in zip(("model interrupt", "control"), told))
        alarm.control = calm.name
        return alarm, calm


def break_in(item, reply, other):
    """The item once more; two seconds after the system began to answer, the user says what `other` says. None if it did not."""
    onsets = [a for a, b in reply.spans if b > item.end]
    if not onsets:
        return None
    begin = round((max(onsets[0], item.end) + 2.0) * SAMPLE_RATE)
    said = other.sound[round(LEAD * SAMPLE_RATE):]  # and its silence after that
    end = begin / SAMPLE_RATE + other.end - LEAD
    before = F.pad(item.sound, (0, max(0, begin - len(item.sound))))[:begin]
    return dataclasses.replace(other, sound=torch.cat([before, said]), end=end, event=(begin / SAMPLE_RATE, end), control=item.name)


def run_scenarios(run, world, n):
    """n items of each scenario, held to a system: run(items, what) -> their replies. Returns [(Item, Reply), ...]."""
    def make(what, f, *args):
        return [f(*args) for _ in tqdm(range(n), f"speaking: {what}", unit="item", leave=False)]
    out = []
    for items in (make("turn-taking", world.request, "turn-taking"),
                  make("pause", world.hesitation, "pause", 0.64, 0.89),
                  make("long pause", world.hesitation, "long pause", 1.5, 1.5),
                  make("model backchannel", world.story, "model backchannel")):
        out += zip(items, run(items, items[0].scenario))
    pairs = make("model interrupt", world.hazard)
    for items in zip(*pairs):
        out += zip(items, run(items, items[0].scenario))
    # Two passes: where the system speaks is known after the first. The second is the same up to the event.
    long = make("long answers", world.request, "control", "chant")
    alone = run(long, "long answers")
    out += zip(long, alone)
    for scenario, others in (("user interrupt", make("user interrupt", world.request, "user interrupt")),
                             ("user backchannel", make("user backchannel", world.backchannel, "user backchannel"))):
        items = [break_in(*x) or x[0] for x in zip(long, alone, others)]  # as many, so that nothing but the event differs
        out += [(item, reply) for item, reply in zip(items, run(items, scenario)) if item.event]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# what the system does, and what that is worth


@dataclass
class Reply:
    """What a system said meanwhile: the stretches of sound, and what it wrote, [(second, text), ...] (None: not known)."""
    spans: list
    written: list = None

    def words(self, span):
        """Words written for a stretch of speech: they go a little before their sound, or along with it."""
        return len(words_of(p for p in self.written if span[0] - 0.5 <= p[0] < span[1]))

    def is_backchannel(self, span):
        return span[1] - span[0] < 1.0 and (self.written is None or self.words(span) <= 2)

    def takes(self):
        """The stretches of speech with which it takes the turn."""
        return [s for s in self.spans if not self.is_backchannel(s)]

    def silences(self):
        """[(begin, end), ...] around its stretches of speech; the last one lasts for ever."""
        edges = [0.0, *(t for s in self.spans for t in s), math.inf]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]

    def answered(self, item):
        return words_of(p for p in self.written if p[0] > item.end - 0.1) == item.answer.split()


def first(times):
    return min(times, default=None)


def score_turn_taking(item, reply, control):
    onset = first(a for a, _ in reply.spans if a >= item.end)
    return {"TOR": bool(reply.takes()), "JIR": any(a < item.end for a, _ in reply.spans),
            "latency": onset and onset - item.end}


def score_pause(item, reply, control):
    begin = item.pause[0]
    return {"TOR": any(a < item.end and b > begin for a, b in reply.takes()),
            "TOR as FLEXI counts": any(begin <= a < item.end for a, _ in reply.takes())}


def speaks_on(item, control):
    """Whether the control still speaks three seconds after the event begins: only then is there anything to stop. Without a
    control nobody can know, and it counts."""
    begin = item.event[0]
    return control is None or any(a <= begin and b >= begin + 3.0 for a, b in control.spans)


def score_user_interrupt(item, reply, control):
    if not speaks_on(item, control):
        return {"eligible": False}
    begin, end = item.event
    stop = first(max(a, begin) for a, b in reply.silences() if a <= begin + 3.0 and b - max(a, begin) >= 1.0)
    answer = first(a for a, _ in reply.spans if a >= end) if stop else None
    return {"eligible": True, "TTR": stop is not None, "stop latency": stop and stop - begin,
            "silent within 1 s": stop is not None and stop - begin <= 1.0, "response latency": answer and answer - end,
            "overlap (FLEXI's latency)": sum(max(0.0, min(b, end) - max(a, begin)) for a, b in reply.spans)}


def score_user_backchannel(item, reply, control):
    if not speaks_on(item, control):
        return {"eligible": False}
    begin, end = item.event
    return {"eligible": True, "TTR": any(begin <= a <= end + 1.5 and b - a >= 1.5 for a, b in reply.silences())}


def score_model_interrupt(item, reply, control):
    early = lambda reply, item: any(a < item.end - 0.5 for a, _ in reply.takes())
    return {"TOR": early(reply, item)} | ({"control TOR": early(control, item)} if control else {})


def score_model_backchannel(item, reply, control):
    onsets = [s[0] for s in reply.spans if s[0] < item.end and reply.is_backchannel(s)]
    return {"TOR": any(a < item.clauses[-1] for a, _ in reply.takes()), "BCR": len(onsets) / item.end,
            "JSD": jensen_shannon(onsets, item.clauses, item.end)}


def jensen_shannon(found, right, end, width=0.2):
    """Divergence, base 2, between two sets of times as histograms: 0 for the same, 1 for nothing in common."""
    if not found or not right:
        return 1.0
    n = math.ceil(end / width)
    p, q = (torch.bincount(torch.tensor([min(n - 1, int(t / width + 1e-6)) for t in times]), minlength=n).double() / len(times)
            for times in (found, right))
    entropy = lambda x: -(x[x > 0] * x[x > 0].log2()).sum().item()
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


SCORES = {"turn-taking": score_turn_taking, "pause": score_pause, "long pause": score_pause,
          "user interrupt": score_user_interrupt, "model interrupt": score_model_interrupt,
          "user backchannel": score_user_backchannel, "model backchannel": score_model_backchannel}


def score_all(held):
    """[(Item, Reply), ...] -> {scenario: {measure: {"value", "n", ...}}}: shares with their 95% interval, medians of latencies,
    means of other numbers."""
    replies = {item.name: reply for item, reply in held}
    table = {}
    for scenario, score in SCORES.items():
        columns = {}
        for item, reply in held:
            if item.scenario == scenario:
                row = score(item, reply, replies.get(item.control))
                if row.get("eligible", True) and item.answer and reply.written is not None:
                    row["answered"] = reply.answered(item)
                for name, value in row.items():
                    columns.setdefault(name, []).append(value)
        table[scenario] = found = {name: summary(name, values) for name, values in columns.items()}
        if "control TOR" in found:
            found["TOR minus control"] = {"value": found["TOR"]["value"] - found["control TOR"]["value"], "n": found["control TOR"]["n"]}
    return {scenario: columns for scenario, columns in table.items() if columns}


def wilson(hits, n, z=1.96):
    """95% interval of a share."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def share_line(share, low, high, n):
    return f"{share:.3f} [{low:.2f}, {high:.2f}] of {n}"


def summary(name, values):
    values = [v for v in values if v is not None]
    if not values:
        return {"value": None, "n": 0}
    if isinstance(values[0], bool):
        low, high = wilson(sum(values), len(values))
        return {"value": sum(values) / len(values), "n": len(values), "low": low, "high": high}
    return {"value": statistics.median(values) if "latency" in name else statistics.mean(values), "n": len(values)}


# The rows of FLEXI's tables 2 to 4. Its items, its voices, its recogniser and its definitions differ from ours.
COLUMNS = {"TT TOR+": ("turn-taking", "TOR"), "TT lat-": ("turn-taking", "latency"), "TT JIR-": ("turn-taking", "JIR"),
           "PH TOR-": ("pause", "TOR"), "UI TTR+": ("user interrupt", "TTR"), "UI lat-": ("user interrupt", "stop latency"),
           "MI TOR+": ("model interrupt", "TOR"), "UBC TTR-": ("user backchannel", "TTR"), "MBC TOR-": ("model backchannel", "TOR"),
           "MBC BCR+": ("model backchannel", "BCR"), "MBC JSD-": ("model backchannel", "JSD")}
PUBLISHED = {"Moshi": (0.995, 0.696, 0.785, 0.550, 0.462, 2.660, 0.390, 0.020, 0.578, 0.031, 0.947),
             "Freeze-Omni": (1.000, 1.147, 0.120, 0.937, 0.539, 1.751, 0.535, 0.086, 0.608, 0.003, 0.986),
             "VITA-1.5": (1.000, 4.878, 0.000, 0.916, 0.226, 4.016, 0.000, 0.000, 0.578, 0.002, 0.986),
             "Gemini-2.5-flash-live": (1.000, 1.736, 0.000, 0.835, 0.935, 1.766, 0.000, 0.031, 0.045, 0.012, 0.981)}


def report_turns(table, name):
    for scenario, columns in table.items():
        print(f"\n  {scenario}")
        for measure, c in columns.items():
            if c["value"] is None:
                line = "never"
            elif "low" in c:
                line = share_line(c["value"], c["low"], c["high"], c["n"])
            else:
                line = f"{c['value']:.3f} s, median of {c['n']}" if "latency" in measure else f"{c['value']:.3f}, mean of {c['n']}"
            print(f"    {measure:28} {line}")
    print(f"\n{'(+ more is better)':22}" + "".join(f"{column:>10}" for column in COLUMNS))
    ours = [table.get(scenario, {}).get(measure, {}).get("value") for scenario, measure in COLUMNS.values()]
    for system, row in ((name, ours), *PUBLISHED.items()):
        print(f"{system:22}" + "".join(f"{'-' if x is None else f'{x:.3f}':>10}" for x in row))
    print("The published rows are of other items, voices, recognisers and definitions: not comparable item by item.")


# ---------------------------------------------------------------------------------------------------------------------
# conversations as folders, ID/{input.wav, output.wav, meta.json, reply.jsonl}


def keep_talk(folder, item, said, written):
    """reply.jsonl holds the monologue, as chat.py writes it."""
    os.makedirs(os.path.join(folder, item.name), exist_ok=True)
    place = lambda name: os.path.join(folder, item.name, name)
    write_audio(place("input.wav"), item.sound)
    write_audio(place("output.wav"), said)
    facts = {k: v for k, v in dataclasses.asdict(item).items() if k not in ("name", "sound") and v not in (None, ())}
    for name, lines in (("meta.json", [facts]), ("reply.jsonl", [{"time": t, "text": text} for t, text in written])):
        with replace_when_done(place(name)) as temporary, open(temporary, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_talks(folder):
    """The conversations of a folder, ours or of Full-Duplex-Bench v1 (pause.json, turn_taking.json, interrupt.json):
    [(Item, Reply), ...]. Raises ValueError or OSError with the file's name."""
    out = []
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    for name in tqdm(sorted(os.listdir(folder)), "reading", unit="talk", leave=False):
        place = lambda file: os.path.join(folder, name, file)
        labels = [file for file in ("meta.json", "pause.json", "turn_taking.json", "interrupt.json") if os.path.isfile(place(file))]
        if not labels:
            continue
        heard, said = read_audio(place("input.wav")), read_audio(place("output.wav"))
        try:
            with open(place(labels[0]), encoding="utf-8") as f:
                facts = json.load(f)
            item = Item(name, sound=heard, **(facts if labels[0] == "meta.json" else full_duplex_bench(labels[0], facts, heard)))
            needs = {"pause": item.pause, "long pause": item.pause, "user interrupt": item.event, "user backchannel": item.event}
            if item.scenario not in (*SCORES, "control"):
                raise ValueError(f"no scenario {item.scenario!r}")
            for span in (needs.get(item.scenario, (0, 0)), (item.end, item.end), *((t, t) for t in item.clauses)):
                if span is None or not 0 <= span[0] <= span[1] < math.inf:
                    raise ValueError(f"{item.scenario}: needs its times in seconds")
            written = None
            if os.path.isfile(place("reply.jsonl")):
                with open(place("reply.jsonl"), encoding="utf-8") as f:
                    written = [(float(d["time"]), str(d["text"])) for d in map(json.loads, f)]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise ValueError(f"{place(labels[0])}: not what --folder reads ({type(e).__name__}: {e})") from None
        out.append((item, Reply(speech(said), written)))
    if not out:
        raise ValueError(f"{folder}: holds no folder with input.wav, output.wav and meta.json (or Full-Duplex-Bench's pause.json, "
                         "turn_taking.json, interrupt.json)")
    return out


def full_duplex_bench(file, facts, heard):
    """The labels of Full-Duplex-Bench v1 as fields of an Item."""
    begin, end = (float(t) for t in (*facts[0]["timestamp"], math.nan)[:2])
    if file == "turn_taking.json":
        return {"scenario": "turn-taking", "end": begin}
    if file == "interrupt.json":
        return {"scenario": "user interrupt", "end": end, "event": (begin, end)}
    return {"scenario": "pause", "end": speech(heard)[-1][1], "pause": (begin, end)}
