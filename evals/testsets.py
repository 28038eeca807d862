"""The measures of the paper's section 4 on a test set of your own: ASR style, TTS style, spoken questions,
and Full-Duplex-Bench.

    --hear FOLDER      audio of a manifest --model--> monologue,              against its text: WER, CER
    --say FOLDER       text of a manifest  --model--> audio --recogniser-->   against that text
    --ask FILE         a spoken question   --model--> monologue and audio:    does it contain an answer?
    --folder FOLDER    input.wav           --model--> output.wav              (conversations.py, turns.py)

Text is compared in lower case and without punctuation: word by word, or, in languages without spaces, letter
by letter (CER).
"""
import json
import math
import os
import random
import re
import shutil
import statistics
import unicodedata

import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy.voices
from evals.conversations import (BATCH, converse_all, find_conversations, read_conversations,
                                 save_monologue, written)
from evals.turns import LEAD, report_turns, score_all, silence
from files.atomic import replace_when_done
from files.audio import read_audio, seconds_of, write_audio
from files.command import Command
from files.fields import FILE, check_fields, parse_json, text
from files.manifest import check_line, clip_key
from files.tokenizer import NO_SPACES, encode_words
from mimi import FRAME
from streams import LISTEN, ROWS, SPEAK, TEXT, TEXT_LEAD

BEFORE = 6  # frames before a clip or a sentence
QUIET = 25  # frames of <wait> after which a transcript is over
AFTER = 40  # frames that a transcript may take, and half the clip's
FADE = 12  # frames of silence after which a sentence has been said
ANSWER = 12.0  # seconds that the model has to answer a question


# ------------------------------------------------------------------------------------------------------------
# text


def normalise(text):
    """Words in lower case without punctuation."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = "".join(c if c.isalnum() or c == "'" or unicodedata.category(c)[0] == "M" else " " for c in text)
    return [word for w in kept.split() if (word := w.strip("'"))]


def units(text, like=None):
    """("WER", words), or ("CER", letters) if `like` (default: the text) is in a script without spaces."""
    words, letters = normalise(text), NO_SPACES.search("".join(normalise(like or text)))
    return ("CER", list("".join(words))) if letters else ("WER", words)


def read_recordings(folder, roles, split=None):
    """The turns of these roles in a manifest's lines of a split (default: all but "train"): [{"text", "path",
    ...}, ...]. folder: of a manifest, or of what was encoded from it. ValueError for a turn without words."""
    path = os.path.join(folder, "manifest.jsonl")
    if not os.path.isfile(path) and os.path.isfile(os.path.join(folder, "meta.json")):
        path = os.path.join(os.path.dirname(os.path.abspath(folder)), "manifest.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such manifest; files/manifest.py says what it holds")
    turns = {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                d = check_line(line, number, os.path.dirname(path))
                if split not in (None, d["split"]) or not split and json.loads(line).get("split") == "train":
                    continue
                for turn in (t for t in d.get("turns", ()) if t["role"] in roles):
                    if not normalise(turn["text"]):
                        raise ValueError("a text has no words; a test set needs those that are spoken")
                    turns[clip_key(turn)] = turn
            except (ValueError, OSError) as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
    if not turns:
        raise ValueError(f"{path}: holds no recording of {' or '.join(roles)} that is not for training")
    return list(turns.values())


def batches(items, length, description):
    """Lists of items of similar length, the longest first, with a bar."""
    items = sorted(items, key=length, reverse=True)
    with tqdm(total=len(items), desc=description, unit="item", leave=False) as bar:
        for i in range(0, len(items), BATCH):
            yield items[i:i + BATCH]
            bar.update(len(items[i:i + BATCH]))


def save_lines(path, lines):
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


# ------------------------------------------------------------------------------------------------------------
# ASR style


@torch.inference_mode()
def transcribe(duplex, clips):
    """ASR style, as in post-training: clips [(N,), ...] into the listening rows, nothing in the speaking
    ones; what the model writes, [text, ...], greedily."""
    v, device = duplex.vocab, duplex.device
    frames = torch.tensor([-(-len(x) // FRAME) for x in clips], device=device)
    ends, T = BEFORE + frames, BEFORE + int((frames + AFTER + frames // 2).max())
    wav = torch.stack([F.pad(x, (BEFORE * FRAME, (T - BEFORE) * FRAME - len(x))) for x in clips])
    wav = wav[:, None, :int(ends.max()) * FRAME].to(device).split(8)  # eight at a time, to bound the memory
    codes = torch.cat([duplex.codec.encode(x) for x in wav])  # (B, K, T)
    text, texts = codes.new_full((len(clips),), v.wait), []
    cache, waits = duplex.model.init_cache(len(clips)), torch.zeros_like(ends)
    last = empty = codes.new_full(codes.shape[:2], v.empty)
    for t in range(T):
        heard = ((t >= BEFORE) & (t < ends))[:, None]  # the clip alone
        frame = codes[..., t].where(heard, empty) if t < codes.shape[-1] else empty
        column = codes.new_empty(len(clips), ROWS)
        column[:, TEXT], column[:, SPEAK] = text, empty
        column[:, LISTEN], last = torch.where(duplex.delayed, last, frame), frame
        logits = duplex.model.text_logits(duplex.model.hidden_step(column, cache))
        text = logits[:, :v.text_size].argmax(-1)
        over = (waits >= QUIET) | (t >= ends + AFTER + frames // 2)
        texts.append(text.masked_fill(over, v.wait))
        waits = torch.where(over, waits, torch.where((t >= ends) & (text == v.wait), waits + 1, 0))
        if over.all():
            break
    return ["".join(x for _, x in written(duplex, tokens)) for tokens in torch.stack(texts, 1).cpu()]


def hear(duplex, turns, scores, out):
    """Transcripts of recordings, against their texts; all of them in out/heard.jsonl."""
    lines, seconds = [], lambda turn: seconds_of(*clip_key(turn))
    for batch in batches(turns, seconds, "hearing"):
        clips = [read_audio(path, start=start, end=end) for path, start, end in map(clip_key, batch)]
        for turn, found in zip(batch, transcribe(duplex, clips)):
            compare(scores, "hearing", found, turn["text"])
            lines.append({"audio": turn["path"], "text": turn["text"], "found": found})
    save_lines(os.path.join(out, "heard.jsonl"), lines)
    return f"{out}/heard.jsonl"


def compare(scores, what, found, right):
    kind, reference = units(right)
    scores.add_errors(f"{what} 1 - {kind}", units(found, right)[1], reference)
    scores.add(f"{what} exactly", units(found, right)[1] == reference)


# ------------------------------------------------------------------------------------------------------------
# TTS style


@torch.inference_mode()
def say(duplex, texts, seed=1, post_trained=False):
    """TTS style: the monologue is given, the model speaks until it is silent for a second: texts -> audio
    [(N,), ...]. Both channels are silent before and meanwhile, as when it answers; post_trained: they are
    empty, for a model without fine-tuning. ValueError for a text without words, and if logits are NaN or
    infinite."""
    if not all(map(normalise, texts)):
        raise ValueError("there are no words in the text to say")
    v, device = duplex.vocab, duplex.device
    state, start = duplex.init_state(range(seed, seed + len(texts))), BEFORE + TEXT_LEAD
    tokens = [sum(encode_words(text, duplex.tokenizer), []) for text in texts]
    limits = [start + 25 + 3 * len("".join(normalise(text))) for text in texts]  # 0.24 s a letter, and 2 s
    limits = torch.tensor(limits, device=device)
    row = torch.full((len(texts), BEFORE + max(map(len, tokens)) + 1), v.wait)
    for i, sentence in enumerate(tokens):
        row[i, BEFORE:BEFORE + len(sentence)] = torch.tensor(sentence)
    nothing = torch.full_like(duplex.silence, v.empty) if post_trained else duplex.silence
    row, nothing = row.to(device), nothing.repeat(len(texts), 1)
    speak, audio, last, quiet = nothing, [], torch.zeros_like(limits), torch.zeros_like(limits)
    for t in range(int(limits.max())):
        column = torch.empty(len(texts), ROWS, dtype=torch.long, device=device)
        column[:, TEXT] = row[:, min(t, row.shape[1] - 1)]
        column[:, SPEAK], column[:, LISTEN] = speak, nothing
        _, new = duplex.model.step(column, state.cache, lambda logits: row[:, 0],
                                   lambda logits, k: duplex.sample_code(logits, k, state))
        frame, speak = torch.where(duplex.delayed, new, speak), new
        if t + 1 < start:  # the audio begins two frames after the text
            speak = nothing
        elif t + 1 == start:
            speak = torch.where(duplex.delayed, nothing, new)
        else:
            sound = duplex.codec.decode_step(frame[..., None], state.codec)[:, 0]
            loud = 20 * torch.log10(sound.square().mean(1).sqrt() + 1e-6) > -45
            over = (last > 0) & (quiet >= FADE) | (t >= limits)
            audio.append(sound)
            last = torch.where(loud & ~over, len(audio), last)  # frames up to the last that is loud
            quiet = torch.where(loud & ~over, 0, quiet + 1)
            if over.all():
                break
    if state.failed.any():
        raise ValueError("the model's logits are not numbers; its weights are damaged")
    return [x[:(n + 3) * FRAME] for x, n in zip(torch.cat(audio, 1).cpu(), last.tolist())]


def speak_texts(duplex, texts, scores, recogniser, out, seed, post_trained):
    """Each text, said by the model into out/said/NUMBER.wav, as a recogniser hears it."""
    lines, number = [], {text: i for i, text in enumerate(texts, 1)}
    for batch in batches(texts, len, "saying"):
        for text, wav in zip(batch, say(duplex, batch, seed + number[batch[0]], post_trained)):
            path = os.path.join(out, "said", f"{number[text]:05}.wav")
            write_audio(path, wav, flush=False)
            found = " ".join(recogniser.hear(wav))
            compare(scores, "saying", found, text)
            lines.append({"audio": os.path.basename(path), "text": text, "found": found})
    save_lines(os.path.join(out, "said", "said.jsonl"), sorted(lines, key=lambda line: line["audio"]))
    return f"{out}/said/"


# ------------------------------------------------------------------------------------------------------------
# spoken questions


def read_questions(path, tts):
    """Lines {"audio" or "text", "answers": [...]} -> [(line, heard (N,)), ...]. A text without audio is
    spoken by the synthesiser. ValueError or OSError with the line's number."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of questions")
    synthesiser, out = None, []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(tqdm(f, "questions", unit="line", leave=False), 1):
            try:
                d = parse_json(line)
                check_question(d)
                if "audio" in d:
                    wav = read_audio(os.path.join(os.path.dirname(path), d["audio"]))
                else:
                    synthesiser = synthesiser or toy.voices.get_synthesiser(tts)
                    voice = "cmn" if NO_SPACES.search(d["text"]) else "en-us"
                    wav = torch.from_numpy(toy.voices.speak(synthesiser, [d["text"]], [], voice)[0])
            except (ValueError, OSError) as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
            out.append((d, torch.cat([silence(LEAD), wav, silence(ANSWER)])))
    if not out:
        raise ValueError(f"{path}: holds no question")
    return out


def check_question(d):
    words = lambda x: isinstance(x, str) and bool(normalise(x))
    if not isinstance(d, dict) or not any(words(d.get(key)) for key in ("audio", "text")):
        raise ValueError('is not {"audio" or "text": ..., "answers": [...]}')
    check_fields(d, {}, {"audio": FILE, "text": text()}, "a question")
    answers = d.get("answers")
    if not isinstance(answers, list) or not answers or not all(map(words, answers)):
        raise ValueError("needs the field 'answers', a list of the right ones")


def contains(reply, answers):
    """Whether one of the answers occurs in a reply, word for word, or in languages without spaces letter for
    letter."""
    for answer in answers:
        _, found = units(reply, answer)
        _, right = units(answer)
        if any(found[i:i + len(right)] == right for i in range(len(found) - len(right) + 1)):
            return True
    return False


def ask(duplex, questions, scores, recogniser, judge, out, seed):
    """Each question, spoken to the model. A reply is right if it contains an answer, as written, and as heard
    by the recogniser if there is one. judge: a command that reads {"question", "answers", "reply"} from its
    standard input and prints a number. Everything is in out/asked.jsonl."""
    questions, lines, marks = sorted(questions, key=lambda q: len(q[1])), [], []
    case = lambda d, reply: {"question": d.get("text", d.get("audio")), "answers": d["answers"],
                             "reply": reply}
    if recogniser:  # both must work, before hours of conversations
        recogniser.hear(questions[0][1])
    if judge:
        mark(judge, case(questions[0][0], ""))
    (conversations,) = converse_all(duplex, [[heard for _, heard in questions]], seed, "asking")
    for (d, _), (tokens, said) in zip(questions, conversations):
        reply = "".join(text for _, text in written(duplex, tokens))
        reply = re.sub(r"<asr>.*?(<answer>|$)", "", reply).strip()  # of fine-tuning 1: what it heard
        line = {**d, "reply": reply, "right": contains(reply, d["answers"])}
        scores.add("answers, written", line["right"])
        if recogniser:
            line["heard"] = " ".join(recogniser.hear(said))
            scores.add("answers, spoken", contains(line["heard"], d["answers"]))
        if judge:
            line["mark"] = mark(judge, case(d, reply))
            marks.append(line["mark"])
        lines.append(line)
    save_lines(os.path.join(out, "asked.jsonl"), lines)
    if marks:
        spread = 1.96 * statistics.stdev(marks) / math.sqrt(len(marks)) if marks[1:] else math.inf
        mean = statistics.mean(marks)
        interval = f"[{mean - spread:.2f}, {mean + spread:.2f}]"
        print(f"  {'the judge':28} {mean:.3f} {interval}, mean of {len(marks)}")
    return f"{out}/asked.jsonl"


def mark(judge, case):
    """The number that the command prints last."""
    printed = Command("--judge", judge)(json.dumps(case, ensure_ascii=False))
    numbers = re.findall(r"-?\d+(?:\.\d+)?", printed)
    if not numbers:
        raise ValueError(f"--judge {judge} failed: it printed no number but {printed[:100]!r}")
    return float(numbers[-1])


# ------------------------------------------------------------------------------------------------------------
# folders of conversations


def converse_in(duplex, folder, keep, seed):
    """Our model over every input.wav (and clean_input.wav) below a folder, in place or in a copy within
    `keep`: output.wav and reply.jsonl (and clean_output.wav). Returns the folder. ValueError if there are
    outputs already."""
    names, root = find_conversations(folder), folder
    if keep:
        root = os.path.join(keep, os.path.basename(os.path.abspath(folder)))
        leave = shutil.ignore_patterns("*output.*", "*reply.jsonl")
        for name in names:
            copy = os.path.join(root, name)
            shutil.copytree(os.path.join(folder, name), copy, ignore=leave, dirs_exist_ok=True)
    jobs = [(os.path.join(root, name), prefix) for name in names for prefix in ("", "clean_")
            if os.path.isfile(os.path.join(root, name, prefix + "input.wav"))]
    for path, prefix in jobs:
        if os.path.exists(os.path.join(path, prefix + "output.wav")):
            raise ValueError(f"{path}/{prefix}output.wav: is there already; score it without --checkpoint, "
                             "or name a folder for this model's with --keep")
    heard = [(read_audio(os.path.join(path, prefix + "input.wav")), path, prefix) for path, prefix in jobs]
    heard.sort(key=lambda job: len(job[0]))
    (conversations,) = converse_all(duplex, [[x for x, *_ in heard]], seed, "talking")
    for (_, path, prefix), (tokens, said) in zip(heard, conversations):
        write_audio(os.path.join(path, prefix + "output.wav"), said, flush=False)
        if not prefix:
            save_monologue(os.path.join(path, "reply.jsonl"), written(duplex, tokens))
    return root


# ------------------------------------------------------------------------------------------------------------


def measure(duplex, scores, recogniser, args):
    """What args.hear, .say, .ask or .folder name. scores: an empty Proportions, see eval.py; recogniser():
    makes one. Prints every measure with its 95% interval and its count."""
    out = os.path.normpath(args.keep or args.checkpoint)
    some = lambda items: items if args.items is None or args.items >= len(items) else \
        random.Random(args.seed).sample(items, args.items)
    if args.folder:
        root = converse_in(duplex, args.folder, args.keep, args.seed)
        report_turns(score_all(read_conversations(root)), os.path.basename(os.path.normpath(args.checkpoint)))
        return print(f"\nWrote what it said to {root}/")
    print(f"\n{args.hear or args.say or args.ask}, seed {args.seed}, 95% intervals in brackets")
    if args.hear:
        wrote = hear(duplex, some(read_recordings(args.hear, ("user", "either"), args.split)), scores, out)
    elif args.say:
        turns = read_recordings(args.say, ("model", "either"))
        texts = some(list(dict.fromkeys(turn["text"] for turn in turns)))
        wrote = speak_texts(duplex, texts, scores, recogniser(), out, args.seed, args.post_trained)
    else:
        questions = some(read_questions(args.ask, args.tts))
        wrote = ask(duplex, questions, scores, recogniser() if args.asr else None, args.judge, out, args.seed)
    for name in sorted(scores.n):
        print(f"  {name:28} {scores.line(name)}")
    print(f"Wrote {wrote}")
