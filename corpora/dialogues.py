"""Written dialogues -> spoken dialogues, by a synthesiser."""
import json
import os
import random
import shutil

from files.atomic import check_folder
from files.manifest import SPOKEN, write_manifest
from toy.voices import get_synthesiser, speak_all
from toy.world import LANGUAGES


def speak_dialogues(source, out, voices, seed, tts):
    """Written dialogues, lines {"turns": [{"role": "user", "text": "..."}, {"role": "model", "text": "..."},
    ...]}, perhaps with "lang" -> the same with audio, in the folder `out`. The user keeps one voice
    throughout a dialogue."""
    out, work = check_folder(out, SPOKEN)
    synthesiser = get_synthesiser(tts)
    rng, lines, jobs = random.Random(seed), [], []
    with open(source, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                d = json.loads(line)
                language = LANGUAGES[d.get("lang", "en")]
                user = rng.choice(language.user_voices(voices, seed))
                for i, t in enumerate(d["turns"]):
                    if t["role"] != ("user", "model")[i % 2] or not t["text"].strip():
                        raise ValueError("user and model take turns, the user first, and each says something")
                    t["voice"] = user if t["role"] == "user" else language.model_voice
                    t["audio"] = f"turns/{number:06d}-{i}.flac"
                    jobs.append((os.path.join(work, t["audio"]), [t["text"]], [], t["voice"]))
                if not d["turns"] or len(d["turns"]) % 2:
                    raise ValueError("it needs turns, and the last one is the model's")
                lines.append(d)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{source}, line {number}: {type(e).__name__}: {e}") from None
    if not lines:
        raise ValueError(f"{source}: holds no dialogue")
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(os.path.join(work, "turns"))
    seconds = sum(ends[-1] for ends in speak_all(jobs, "turns", synthesiser))
    write_manifest(lines, work, out)
    print(f"Wrote {len(lines)} dialogues, {seconds / 3600:.2f} hours of audio, to {out}/manifest.jsonl; "
          f"next: python prepare.py encode --data {out}")
