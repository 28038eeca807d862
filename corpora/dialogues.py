"""Written dialogues -> spoken dialogues, by a synthesiser."""
import os
import random
import shutil

from files.atomic import check_folder
from files.fields import check_fields, lines_of, list_of, parse_json, text
from files.manifest import SPOKEN, write_manifest
from toy.voices import get_synthesiser, speak_all
from toy.world import LANGUAGES

SPEAKER = "a name or a number", lambda x: type(x) is int or text(100)[1](x)


def read_voices(path):
    """[the model's voice, the users' voices]: one a line, the model's first."""
    with open(path, encoding="utf-8") as f:
        names = [line.strip() for line in f if line.strip()]
    if len(names) < 2:
        raise ValueError(f"{path}: needs two voices or more, one a line, the model's first")
    return names[0], names[1:]


def voices_of(code, n, seed, tts, given):
    """(the model's voice, [the users' voices]) for a language. given: what read_voices returned, or None."""
    if given:
        return given
    if code not in LANGUAGES and not tts:
        raise ValueError(f"lang {code!r} needs another synthesiser (--tts); espeak-ng speaks "
                         f"{' and '.join(LANGUAGES)} here")
    language = LANGUAGES.get(code, LANGUAGES["en"])
    return language.model_voice, language.user_voices(n, seed)


def give_voices(turns, model, users, rng):
    """Set each turn's "voice", unless it has one: that of the model, or one voice for each "speaker" among
    the users (without speakers there is one)."""
    names = list(dict.fromkeys(t.get("speaker") for t in turns if t["role"] == "user" and "voice" not in t))
    if len(names) > len(users):
        raise ValueError(f"it has {len(names)} speakers, more than the {len(users)} user voices")
    voices = dict(zip(names, rng.sample(users, len(names))))
    for t in turns:
        t.setdefault("voice", model if t["role"] == "model" else voices.get(t.get("speaker")))


def read_dialogues(source, voices, tts_voices, seed, tts):
    """The lines of a file of dialogues, with an audio file's name and a voice for each turn, and what is to
    be spoken: [(file, [text], [], voice), ...]. ValueError or OSError with the line's number."""
    given = read_voices(tts_voices) if tts_voices else None
    rng, lines, jobs = random.Random(seed), [], []
    with open(source, "rb") as f:
        for number, line in enumerate(lines_of(f), 1):
            try:
                d = parse_json(line)
                check_fields(d, {"turns": list_of(("a turn", lambda t: isinstance(t, dict)), 1000)},
                             {"lang": text(20)}, "a dialogue")
                known = voices_of(d.get("lang", "en"), voices, seed, tts, given)
                for i, t in enumerate(d["turns"]):
                    check_fields(t, {"role": text(20), "text": text()},
                                 {"speaker": SPEAKER, "voice": text(100)}, f"turn {i}")
                    if t["role"] != ("user", "model")[i % 2] or not t["text"].strip() or "\0" in t["text"]:
                        raise ValueError("user and model take turns, the user first, and each says something")
                if not d["turns"] or len(d["turns"]) % 2:
                    raise ValueError("it needs turns, and the last one is the model's")
                give_voices(d["turns"], *known, rng)
                for i, t in enumerate(d["turns"]):
                    t["audio"] = f"turns/{number:06d}-{i}.flac"
                    jobs.append((t["audio"], [t["text"]], [], t["voice"]))
                lines.append(d)
            except ValueError as e:
                raise ValueError(f"{source}, line {number}: {e}") from None
    if not lines:
        raise ValueError(f"{source}: holds no dialogue")
    return lines, jobs


def speak_dialogues(source, out, voices, tts_voices, seed, tts):
    """Written dialogues, lines {"turns": [{"role": "user", "text": "..."}, {"role": "model", "text": "..."},
    ...]}, perhaps with "lang" -> the same with audio, in the folder `out`. A user keeps one voice throughout
    a dialogue; where several talk, a turn's "speaker" tells them apart, or its "voice" says how it sounds."""
    out, work = check_folder(out, SPOKEN)
    synthesiser = get_synthesiser(tts)
    lines, jobs = read_dialogues(source, voices, tts_voices, seed, tts)
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(os.path.join(work, "turns"))
    jobs = [(os.path.join(work, audio), *job) for audio, *job in jobs]
    seconds = sum(ends[-1] for ends in speak_all(jobs, "turns", synthesiser))
    write_manifest(lines, work, out)
    print(f"Wrote {len(lines)} dialogues, {seconds / 3600:.2f} hours of audio, to {out}/manifest.jsonl; "
          f"next: python prepare.py encode --data {out}")
