"""Does it hear, speak, take turns? Conversations frame by frame through engine.py, and recordings of any other system.

    python eval.py --checkpoint out/tiny                         answers, hearing, and FLEXI's scenarios, 200 items each
    python eval.py --checkpoint out/tiny --smoke                 the scenarios with 20 items
    python eval.py --checkpoint out/tiny --keep out/talks        also keep every conversation of the scenarios as a folder
    python eval.py --folder out/talks                            score such a folder, whatever system has spoken there
    python eval.py --checkpoint out/tiny --asr 'mycmd {wav}'     another recogniser: it prints the words it hears
    python eval.py --codec out/codec/checkpoint.pt               the codec alone: how far off, how well understood

Answers, to requests that were never trained on (FLM-Audio, section 4):

    text        the monologue is the right answer, word for word
    spoken      the reply, as the recogniser hears it: share of right words (1 - word error rate), and all words right;
                against the right answer, and against what the model itself has written
    in time     the reply begins at most 0.4 s after the user's end; early: before it
    kept on     of an answer of six words or more, the last word that was written is the last that is heard
    hearing     ASR style: the clip is heard, the text channel writes down what was said

Turns (FLEXI, with definitions that leave no holes): what a system does is judged by where there is sound on its channel. A
stretch of speech shorter than a second is a backchannel, a longer one takes the turn.

    one frame   [ user's sound, 80 ms ] -> system -> [ its sound, 80 ms ] on the same clock

What recogniser.py makes of the originals and of their codec reconstructions is printed as the ceiling.
"""
import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy
from chat import speech
from engine import Speaker
from files import SAMPLE_RATE, read_audio, replace_when_done, write_audio
from live import Transcript
from manifest import read_manifest
from mimi import FRAME, Mimi, log_spectral_distance, mel_filters
from recogniser import get_recogniser
from streams import LATE, LISTEN, ROWS, SPEAK, TEXT
from toy import LANGUAGES, SHARES, cut_in_two, make_request, make_story

LEAD = 1.0  # seconds of silence before the user speaks
KINDS = ("repeat", "count", "next", "opposite")  # of requests that are asked for their answers: no chants, no stories
LISTEN_ON = 2.5  # seconds that a recording goes on after the expected answer


# ---------------------------------------------------------------------------------------------------------------------
# measures


def word_errors(found, right):
    """Words to insert, delete or exchange."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def wilson(hits, n, z=1.96):
    """95% interval of a share."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def share_line(share, low, high, n):
    return f"{share:.3f} [{low:.2f}, {high:.2f}] of {n}"


class Shares:
    """Named counts of hits, printed as shares with their 95% intervals."""

    def __init__(self):
        self.hits, self.n = Counter(), Counter()

    def add(self, name, hit, of=1):
        self.hits[name] += hit
        self.n[name] += of

    def add_right(self, name, found, right):
        """How many of the right words (or letters) were found: 1 - error rate."""
        self.add(name, max(0, len(right) - word_errors(found, right)), len(right))

    def share(self, name):
        return self.hits[name] / max(1, self.n[name])

    def line(self, name):
        return share_line(self.share(name), *wilson(self.hits[name], self.n[name]), self.n[name])


def converse_all(speaker, sounds, seed, what, rows=50):
    """Many conversations, up to `rows` side by side, cut to the length of their sounds (N,): [(text tokens (T,), sound said (N,)), ...]
    Those of similar length should be neighbours. On a CPU each core has its own."""
    cores = os.cpu_count() if speaker.device == "cpu" else 1
    rows = max(1, min(rows, -(-len(sounds) // cores)))
    some = [sounds[i:i + rows] for i in range(0, len(sounds), rows)]
    padded = [torch.stack([F.pad(x, (0, max(map(len, part)) - len(x))) for x in part]) for part in some]
    bar = tqdm(total=sum(-(-x.shape[1] // FRAME) for x in padded), desc=f"{what}, {len(sounds)}", unit="frame", leave=False)
    with ThreadPoolExecutor(cores, initializer=one_thread, initargs=(speaker,)) as pool:
        talks = pool.map(lambda x, i: speaker.converse(x, seed + i, each=lambda t, text: bar.update()), padded, range(0, len(sounds), rows))
        out = [(t[:-(-len(x) // FRAME)], y[:len(x)]) for part, (text, said) in zip(some, talks) for x, t, y in zip(part, text, said)]
    bar.close()
    return out


def one_thread(speaker):
    if speaker.device == "cpu":
        torch.set_num_threads(1)


def seconds(x):
    return torch.zeros(round(x * SAMPLE_RATE))


def written(speaker, text):
    """The monologue of text tokens (T,): [(second, text), ...]"""
    transcript = Transcript(speaker)
    for t, token in enumerate(text.tolist()):
        transcript.add(t, token)
    return [(piece["time"], piece["text"]) for piece in transcript.pieces]


def words_of(pieces):
    return "".join(text for _, text in pieces).split()


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answers(speaker, recogniser, items, seed, shares, name):
    """Each item's request, spoken to the model after a second of silence. Returns the conversations."""
    items = sorted(items, key=lambda d: len(d["turns"][1]["starts"]))
    users, replies = ([read_audio(d["turns"][i]["path"]) for d in items] for i in (0, 1))
    sounds = [torch.cat([seconds(LEAD), u, seconds(len(r) / SAMPLE_RATE + LISTEN_ON)]) for u, r in zip(users, replies)]
    talks = converse_all(speaker, sounds, seed, name)
    languages = len({d.get("lang") for d in items})
    for d, user, reply, (text, said) in zip(items, users, replies, talks):
        right, end = d["turns"][1]["text"].split(), LEAD + len(user) / SAMPLE_RATE
        wrote, heard, spans = words_of(written(speaker, text)), recogniser.hear(said), speech(said)
        shares.add(f"{name} text", wrote == right)
        shares.add(f"{name} text, {d['kind']}", wrote == right)
        if languages > 1:
            shares.add(f"{name} text, {d['lang']}", wrote == right)
        shares.add_right(f"{name} spoken words", heard, right)
        shares.add(f"{name} spoken exactly", heard == right)
        shares.add_right(f"{name} spoken as written", heard, wrote)
        onset = first(a for a, _ in spans)
        shares.add(f"{name} in time", onset is not None and end <= onset <= end + 0.4)
        shares.add(f"{name} early", onset is not None and onset < end)
        if len(right) >= 6:
            shares.add(f"{name} kept on", bool(heard) and heard[-1:] == wrote[-1:])
    return list(zip(items, sounds, talks))


def ceiling(codec, recogniser, items, shares, name):
    """What the recogniser makes of the originals, and of them after the codec."""
    for turn in (t for d in items for t in d["turns"]):
        sound = read_audio(turn["path"])
        understood(recogniser, sound, turn["text"], shares, f"{name} {turn['role']} original")
        understood(recogniser, reconstruct(codec, sound), turn["text"], shares, f"{name} {turn['role']} codec")


@torch.inference_mode()
def hearing(speaker, items, shares, name):
    """ASR style: each clip into the listening rows, nothing on the speaking ones; the text is what the model has understood."""
    sounds = [read_audio(d["turns"][0]["path"]) for d in items]
    N = max(map(len, sounds)) // FRAME * FRAME + 40 * FRAME
    codes = speaker.codec.encode(torch.stack([F.pad(x, (6 * FRAME, N - len(x))) for x in sounds])[:, None].to(speaker.device))
    v, state = speaker.vocab, speaker.model.init_state(len(items))
    late, silent = LATE.to(speaker.device), codes.new_full(codes.shape[:2], v.empty)
    text, before, pieces = codes.new_full((len(items),), v.wait), silent, []
    for t, now in enumerate(codes.unbind(-1)):
        spoken = torch.tensor([6 <= t < 6 - (-len(x) // FRAME) for x in sounds], device=speaker.device)
        now = torch.where(spoken[:, None], now, silent)  # the clip and nothing else, as in post-training
        column = torch.empty(len(items), ROWS, dtype=torch.long, device=speaker.device)
        column[:, TEXT], column[:, SPEAK], column[:, LISTEN] = text, silent, torch.where(late, before, now)
        text, before = speaker.model.text_logits(speaker.model.hidden_step(column, state))[:, :v.text_size].argmax(-1), now
        pieces.append(text)
    for d, tokens in zip(items, torch.stack(pieces, 1).cpu()):
        right, found = d["turns"][0]["text"].split(), words_of(written(speaker, tokens))
        shares.add_right(f"{name} words heard", found, right)
        shares.add_right(f"{name} letters heard", "".join(found), "".join(right))


def understood(recogniser, sound, text, shares, label):
    heard, right = recogniser.hear(sound), text.split()
    shares.add_right(f"{label} words", heard, right)
    shares.add(f"{label} exactly", heard == right)


def reconstruct(codec, x):
    device = next(codec.parameters()).device
    return codec.decode(codec.encode(x[None, None].to(device)))[0, 0, :len(x)].cpu()


# ---------------------------------------------------------------------------------------------------------------------
# the codec alone


def codec_quality(codec, recogniser, dialogues, n, seed):
    """Held-out speech through the codec: how far its log-mel spectrum is off, and how much of it is still understood."""
    print(f"\nHeld-out speech through the codec, seed {seed}: words understood / clips understood entirely")
    for split, role, who in (("seen", "user", "users heard in training"), ("new", "user", "new users"),
                             ("seen", "model", "the model's voice")):
        clips = {t["path"]: t["text"] for d in dialogues if d["split"] == split for t in d["turns"] if t["role"] == role}
        clips = random.Random(seed).sample(sorted(clips.items()), min(n, len(clips)))
        shares, off = Shares(), 0.0
        for path, text in tqdm(clips, who, unit="clip", leave=False):
            sound = read_audio(path)
            heard = reconstruct(codec, sound)
            off += log_spectral_distance(sound, heard, MEL_1024) / len(clips)
            understood(recogniser, sound, text, shares, "original")
            understood(recogniser, heard, text, shares, "codec")
        print(f"  {who:24} {len(clips):4} clips   log-mel distance {off:5.2f} dB   "
              + "   ".join(f"{v} {shares.share(v + ' words'):.3f} / {shares.share(v + ' exactly'):.3f}" for v in ("original", "codec")))


MEL_1024 = mel_filters(1024)


# ---------------------------------------------------------------------------------------------------------------------
# turns: what is said to the system. Times in seconds on the clock of the recording.

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
    """Speaks what the scenarios need: held-out requests, stories, murmurs, by the synthesiser of the toy world or --tts."""

    def __init__(self, dialogues, tts, seed):
        self.voices = {}  # language -> the users' voices
        for d in dialogues:
            if d["split"] == "seen" and d.get("lang") in LANGUAGES and d["turns"][0]["role"] == "user":
                self.voices.setdefault(d["lang"], set()).add(d["turns"][0]["voice"])
        if not self.voices:
            raise ValueError("the scenarios need the toy world's manifest: --data")
        self.rng, self.synthesiser = random.Random(seed), toy.get_synthesiser(tts)
        self.count = Counter()

    def someone(self):
        """(a language, the voice of one who speaks it)"""
        code = self.rng.choice(sorted(self.voices))
        return LANGUAGES[code], self.rng.choice(sorted(self.voices[code]))

    def item(self, scenario, voice, parts, pauses=(), **facts):
        """The user says the parts with pauses between them."""
        sound, ends = toy.speak(self.synthesiser, parts, pauses, voice, 165, 50)
        self.count[scenario] += 1
        return Item(f"{scenario.replace(' ', '-')}-{self.count[scenario]:03d}", scenario,
                    torch.cat([seconds(LEAD), torch.from_numpy(sound), seconds(TAIL)]), LEAD + ends[-1], **facts), \
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
        return self.item(scenario, voice, [self.rng.choice(lang.story.backchannels)])[0]

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


def hold(run, world, n):
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
# turns: what the system does, and what that is worth


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
# turns: conversations as folders, ID/{input.wav, output.wav, meta.json, reply.jsonl}


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


# ---------------------------------------------------------------------------------------------------------------------


def report(shares, seed):
    print(f"\nHeld out, seed {seed}, 95% intervals in brackets")
    for name, who in (("seen", "voices heard in training"), ("new", "new voices")):
        print(f"\n  {who}")
        kinds = sorted(n for n in shares.n if n.startswith(f"{name} text, "))
        for label in (f"{name} text", *kinds, *(f"{name} {x}" for x in ("spoken words", "spoken exactly", "spoken as written",
                                                                      "in time", "early", "kept on", "words heard", "letters heard"))):
            print(f"    {label[len(name) + 1:]:24} {shares.line(label)}")
        for kind in ("user", "model"):
            ceiling = [f"{version} {shares.share(f'{name} {kind} {version} words'):.3f} / "
                       f"{shares.share(f'{name} {kind} {version} exactly'):.3f}" for version in ("original", "codec")]
            print(f"    the recogniser's ceiling, words / exactly, {kind}'s speech: {',  '.join(ceiling)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/tiny")
    parser.add_argument("--codec", help="measure this codec alone instead of a model")
    parser.add_argument("--folder", help="score the conversations in this folder instead: ours (--keep) or Full-Duplex-Bench's")
    parser.add_argument("--data", default="data/toy", help="folder with the manifest of the held-out items")
    parser.add_argument("--items", type=int, default=200, help="for each of seen voices, new voices, and each scenario")
    parser.add_argument("--smoke", action="store_true", help="20 items a scenario")
    parser.add_argument("--keep", help="write every conversation of the scenarios into this folder")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tts", help="another synthesiser for the scenarios, as for prepare.py")
    parser.add_argument("--asr", help="another recogniser: a command with {wav} that prints the words")
    parser.add_argument("--asr-minutes", type=float, help="train the default recogniser so long, if it is not there yet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        if args.folder:
            return report_turns(score_all(read_talks(args.folder)), os.path.basename(os.path.normpath(args.folder)))
        recogniser = get_recogniser(args.asr, args.data, "out/recogniser", args.asr_minutes, args.device)
        dialogues = list(read_manifest(os.path.join(args.data, "manifest.jsonl")))
        if args.codec:
            return codec_quality(Mimi.load(args.codec, args.device), recogniser, dialogues, args.items, args.seed)
        evaluate(Speaker(args.checkpoint, args.device), recogniser, dialogues, args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


def evaluate(speaker, recogniser, dialogues, args):
    rng, shares, talks = random.Random(args.seed), Shares(), []
    for name in ("seen", "new"):
        items = [d for d in dialogues if d["split"] == name and d["kind"] in KINDS]
        items = rng.sample(items, min(args.items, len(items)))
        talks += answers(speaker, recogniser, items, args.seed, shares, name)
        hearing(speaker, items, shares, name)
        ceiling(speaker.codec, recogniser, items[:50], shares, name)

    def run(items, what):
        out = []
        for item, (text, said) in zip(items, converse_all(speaker, [item.sound for item in items], args.seed, what)):
            out.append(Reply(speech(said), written(speaker, text)))
            if args.keep:
                keep_talk(args.keep, item, said, out[-1].written)
        return out

    turns = score_all(hold(run, World(dialogues, args.tts, args.seed), 20 if args.smoke else args.items))
    folder = os.path.join(args.checkpoint, "samples")
    kinds = {d["kind"]: (d, heard, text, said) for d, heard, (text, said) in reversed(talks)}  # the first of each
    print("\nThree of the conversations (left the user, right the model):")
    for kind in [k for k in SHARES if k in kinds][:3]:
        d, heard, text, said = kinds[kind]
        path = os.path.join(folder, f"{kind}.wav")
        write_audio(path, torch.stack([heard, said]))
        print(f"  user: {d['turns'][0]['text']}\n    model: {' '.join(words_of(written(speaker, text)))}\n    {path}")
    report(shares, args.seed)
    report_turns(turns, args.checkpoint)
    path = os.path.join(args.checkpoint, "eval.json")
    with replace_when_done(path) as temporary, open(temporary, "w") as f:
        json.dump({"seed": args.seed, "shares": {k: [shares.hits[k], shares.n[k]] for k in shares.n}, "turns": turns}, f, indent=1)
    print(f"\nWrote {path} and {folder}/" + (f" and {args.keep}/" if args.keep else ""))


if __name__ == "__main__":
    main()
