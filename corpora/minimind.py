"""The training sets of MiniMind-O (.parquet) -> a manifest. Its answers are codes already, of Kyutai's Mimi.

    conversations      JSON: [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]
    question_audios    for each user turn the bytes of a sound file, or nothing
    answer_audios      for each answer 8 codes a frame, one frame after another

A row becomes a dialogue, up to the first turn that is not spoken; or, if only its first answer is, that
alone. From the file to a conversation, on one GPU with 24 GB, with Kyutai's codec:

    python prepare.py minimind sft_a2a.parquet --out data/mm
    python prepare.py encode --data data/mm --tokenizer Qwen2.5-0.5B \\
        --codec tokenizer-e351c8d8-checkpoint125.safetensors
    python train.py --config 0.5b --init Qwen2.5-0.5B --data data/mm/encoded --out out/mm \\
        --frames 2048 --batch 16
    python chat.py --checkpoint out/mm --web
"""
import io
import itertools
import json
import os
import re
import shutil
from collections import Counter

import numpy as np
import soundfile
from tqdm import tqdm

from files.atomic import check_folder
from files.fields import one_line
from files.manifest import CODEC, SPOKEN, write_manifest

COLUMNS = ("conversations", "question_audios", "answer_audios")
ASIDE = re.compile(r"<think>.*?</think>|<image>", re.DOTALL)  # is not spoken


def read_rows(path):
    """Yield the rows of a parquet file as dicts of COLUMNS; one of the audio columns may be missing."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: needs the extra 'parquet' to be read: pip install '.[parquet]'") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with ParquetFile(path) as f:
            names = [name for name in COLUMNS if name in f.schema_arrow.names]
            if "conversations" not in names or len(names) < 2:
                raise ValueError(f"{path}: is not of MiniMind-O, whose columns are {', '.join(COLUMNS)}")
            for batch in f.iter_batches(64, columns=names):
                yield from batch.to_pylist()
    except ArrowException as e:
        raise ValueError(f"{path}: not a .parquet file that can be read ({one_line(e)})") from None


def texts_of(row):
    """[(what the user says, what the answer is), ...] of a row, without system prompts."""
    turns = [(t["role"], " ".join(ASIDE.sub(" ", t["content"]).split()))
             for t in json.loads(row["conversations"]) if t["role"] != "system"]
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        return []
    return [(asked, said) for (_, asked), (_, said) in zip(turns[::2], turns[1::2])]


def write_question(data, path):
    """Write a sound file as it is, with the ending of its format. Returns its path, or None if it is none."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as f:
            path = f"{path}.{f.format.lower()}"
    except (soundfile.LibsndfileError, TypeError):
        return None
    with open(path, "wb") as f:
        f.write(data)
    return path


def write_answer(codes, path):
    """Write 8 codes a frame, up to the first that is none of the codec, as (T, 8). Returns the path, or None
    if there are none."""
    K, size = CODEC
    codes = np.asarray(codes or [], np.int64)
    codes = codes[:len(codes) // K * K].reshape(-1, K)
    bad = np.flatnonzero(((codes < 0) | (codes >= size)).any(1))
    codes = codes[:bad[0]] if len(bad) else codes
    if not len(codes):
        return None
    path += ".npy"
    np.save(path, codes.astype(np.int16))
    return path


def line_of(row, number, work):
    """A line of the manifest, its files in `work`; or (None, why not)."""
    texts, turns = texts_of(row), []
    questions, answers = ([*(row.get(name) or ())] for name in COLUMNS[1:])
    for i, (asked, said) in enumerate(texts):
        name = os.path.join(work, "{}", f"{number:07d}-{i}")
        question = write_question(questions[i], name.format("user")) if i < len(questions) and asked else None
        answer = write_answer(answers[i], name.format("model")) if i < len(answers) and said else None
        heard = {"role": "user", "text": asked, "audio": question and os.path.relpath(question, work)}
        spoken = {"role": "model", "text": said, "codes": answer and os.path.relpath(answer, work)}
        if question and answer:
            turns += [heard, spoken]
            continue
        if not turns and answer:
            turns = [spoken]
        break
    if not turns:
        return None, "nothing spoken" if texts else "user and assistant do not take turns"
    return {"id": number, "turns": turns}, None


def import_minimind(source, out):
    """A training set of MiniMind-O (.parquet) -> the folder `out`: questions as sound files, answers as codes
    of Kyutai's Mimi (so `encode` needs that codec), and their manifest."""
    out, work = check_folder(out, SPOKEN)
    rows, lines, dropped = read_rows(source), [], Counter()
    first = next(rows, None)  # raises an error if the file cannot be read
    if first is None:
        raise ValueError(f"{source}: holds no row")
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("user", "model"):
        os.makedirs(os.path.join(work, folder))
    for number, row in enumerate(tqdm(itertools.chain([first], rows), "read", unit="row")):
        try:
            line, problem = line_of(row, number, work)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            raise ValueError(f"{source}, row {number}: {type(e).__name__}: {one_line(e)}") from None
        dropped[problem] += line is None
        lines += [line] if line else []
    for problem in filter(None, dropped):
        print(f"{dropped[problem]} rows are left out: {problem}")
    if not lines:
        raise ValueError(f"{source}: holds nothing that is spoken")
    write_manifest(lines, work, out)
    print(f"Wrote {len(lines)} lines to {out}/manifest.jsonl; next: python prepare.py encode --data {out} "
          "--codec tokenizer-e351c8d8-checkpoint125.safetensors")
