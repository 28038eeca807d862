"""Text conversations as they are published -> dialogues that `prepare.py speak` can speak.

    ShareGPT     {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}
                 or with "role" and "content", as in OpenAI's
    OpenAI       {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}
    Alpaca       {"instruction": "...", "input": "...", "output": "..."}
    UltraChat    {"data": ["...", "...", ...]}, the user first

One JSON object to a line, or one list of them. The layout is told by the keys.
"""
import json
import re
from collections import Counter

from tqdm import tqdm

from files.atomic import check_folder, replace_when_done
from files.fields import parse_json, text as a_text

ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "model", "assistant": "model",
         "chatgpt": "model", "bot": "model", "model": "model"}
UNSPEAKABLE = re.compile(r"```|`[^`\n]*`|https?://|www\.|\||\\[a-zA-Z]+|\$[^$\n]+\$|<[a-z/][^>\n]*>"
                         r"|[{}\[\]=_~^]")
MARKS = re.compile(r"^\s*(?:#+|[-*+•]|\d+[.)])\s+|\*\*?|__", re.MULTILINE)  # headings, lists, emphasis


def read_objects(path):
    """Yield (where, object) of a .jsonl or of a .json with one list."""
    where = path
    with open(path, encoding="utf-8") as f:
        try:
            first = f.read(4096).lstrip()
            f.seek(0)
            if first.startswith("["):
                yield from ((f"{path}, item {i}", d) for i, d in enumerate(parse_json(f.read()), 1))
                return
            for number, line in enumerate(f, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_json(line)
        except ValueError as e:
            raise ValueError(f"{where}: is not JSON ({e})") from None


def turns_of(d, where):
    """[(role, text), ...] of a conversation, without system prompts. ValueError if its layout is unknown."""
    try:
        if "conversations" in d:
            pairs = [(t["from"], t["value"]) if "from" in t else (t["role"], t["content"])
                     for t in d["conversations"]]
        elif "messages" in d:
            pairs = [(t["role"], t["content"]) for t in d["messages"]]
        elif "instruction" in d:
            asked = "\n".join(filter(None, (d["instruction"], d.get("input", ""))))
            pairs = [("user", asked), ("assistant", d["output"])]
        else:
            pairs = [(("user", "assistant")[i % 2], text) for i, text in enumerate(d["data"])]
        if not all(isinstance(role, str) and a_text(1 << 20)[1](text) for role, text in pairs):
            raise TypeError("a role or a text is not a string")
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{where}: in none of the layouts ShareGPT, OpenAI, Alpaca, UltraChat "
                         f"({type(e).__name__}: {e})") from None
    return [(ROLES.get(role, role), text) for role, text in pairs if role not in ("system", "tool")]


def speakable(text, longest):
    """The text as it would be spoken, or why it cannot be."""
    if UNSPEAKABLE.search(text):
        return None, "code, links, tables or formulas"
    text = " ".join(MARKS.sub("", text).split())
    if not any(c.isalnum() for c in text):
        return None, "no words"
    if len(text.split()) > longest or len(text) > 8 * longest:
        return None, f"more than {longest} words"
    return text, None


def spoken_part(turns, longest):
    """The pairs of user and model up to the first that cannot be spoken: (turns, why the rest was dropped or
    None)."""
    out = []
    for i in range(0, len(turns), 2):
        pair = turns[i:i + 2]
        if [role for role, _ in pair] != ["user", "model"]:
            return out, "user and model do not take turns"
        texts = [speakable(text, longest) for _, text in pair]
        for _, problem in texts:
            if problem:
                return out, problem
        out += [{"role": role, "text": text} for (role, _), (text, _) in zip(pair, texts)]
    return out, None


def import_chats(source, out, longest, lang):
    """Published text conversations (ShareGPT, OpenAI, Alpaca, UltraChat; .json or .jsonl) -> the .jsonl that
    `speak` reads. What cannot be spoken is dropped, with what follows it, and counted."""
    check_folder(out)
    dropped, n = Counter(), 0
    with replace_when_done(out) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for where, d in tqdm(read_objects(source), "read", unit="chat"):
            turns, problem = spoken_part(turns_of(d, where), longest)
            if problem:
                dropped[problem] += 1
            if turns:
                f.write(json.dumps({"lang": lang, "turns": turns}, ensure_ascii=False) + "\n")
                n += 1
        if not n:
            why = ", ".join(f"{k} for {problem}" for problem, k in dropped.most_common()) or "it is empty"
            raise ValueError(f"{source}: holds no conversation that can be spoken ({why})")
    for problem, k in dropped.most_common():
        print(f"{k} conversations end early or are left out: {problem}")
    print(f"Wrote {n} dialogues to {out}; next: python prepare.py speak {out} --out data/mine")
