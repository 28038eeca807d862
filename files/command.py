"""Commands that a user names in a flag, such as --tts 'say -o {out} {text}'. What is filled in comes from
files and is data, never code:

    {text}            alone in a word, or after --flag=; never where a shell or an interpreter would run it
    {voice}, {wav}    within a longer word only if a shell sees one plain word in it
    standard input    the text, for commands that read it; otherwise nothing

A command that takes too long is ended with all that it has started.
"""
import os
import re
import shlex
import signal
import subprocess

LONGEST = 600  # seconds that a command may take
PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
RUNS = re.compile(r"-\w{0,2}[cer]|--?(eval|exec|execute|command)|/[ck]", re.IGNORECASE)  # what comes after it
SHELL = re.compile(r"(.*/)?(ba|da|z|k|a|fi)?sh")


class Command:
    def __init__(self, flag, template, needed=()):
        """needed: names of fields that must occur in it. Raises ValueError for a template that is broken, or
        would run the text."""
        self.name = f"{flag} {template}"
        try:
            self.words = shlex.split(template)
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}") from None
        for field in needed:
            if not any(f"{{{field}}}" in word for word in self.words):
                raise ValueError(f"{self.name}: {{{field}}} does not occur in it")
        if not self.words:
            raise ValueError(f"{self.name}: is empty")
        remote = any(re.fullmatch(r"(.*/)?(ssh|eval)", word) for word in self.words)
        script = self.script()
        for i, (before, word) in enumerate(zip(["", *self.words], self.words)):
            flag = re.fullmatch(r"(?:(--?[\w-]+)=)?\{text\}", word)
            if "{text}" in word and (remote or i == script or RUNS.fullmatch(before) or not flag
                                     or RUNS.fullmatch(flag[1] or "")):
                raise ValueError(f"{self.name}: would run what is in the text; read it from standard input "
                                 "or give {text} as a word of its own: sh -c 'say \"$1\"' sh {text}")

    def script(self):
        """Which word the first shell runs: the one after its flags. None without a shell."""
        for i, word in enumerate(self.words):
            if SHELL.fullmatch(word):
                return next((j for j, flag in enumerate(self.words) if j > i and flag[:1] != "-"), None)
        return None

    def joins(self, field):
        """Whether a field stands within a longer word."""
        return any(f"{{{field}}}" in word and word != f"{{{field}}}" for word in self.words)

    def fill(self, word, values):
        """A word of the template with the values of its fields."""
        alone = re.fullmatch(r"\{(\w+)\}", word)
        if alone and alone[1] in values:
            value = str(values[alone[1]])
            if value.startswith("-") and alone[1] != "text":
                raise ValueError(f"{self.name}: {alone[1]} {value[:40]!r} looks like a flag")
            return " " + value if value.startswith("-") else value  # a space makes it no flag
        for name, value in values.items():
            if f"{{{name}}}" in word and name != "text" and not PLAIN.fullmatch(str(value)):
                raise ValueError(f"{self.name}: {name} {str(value)[:40]!r} is no plain word; give {{{name}}} "
                                 "as a word of its own")
        return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), word)

    def __call__(self, text=None, seconds=LONGEST, **values):
        """Run it with these values and, if given, the text on its standard input: what it prints. Raises
        ValueError if it cannot be run, fails or takes longer than `seconds`."""
        values = values if text is None else {**values, "text": text}
        words = [self.fill(word, values) for word in self.words]
        shown = shlex.join(words)[:300]
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                                       errors="replace", start_new_session=True)
        except (OSError, ValueError) as e:
            raise ValueError(f"{self.name}: cannot be run ({e})") from None
        try:
            out, err = process.communicate(text, seconds)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{shown}: took over {seconds:g} s") from None
        finally:
            if process.returncode is None:
                end(process)
        if process.returncode:
            reason = " ".join(err.split())[-300:] or f"code {process.returncode}"
            raise ValueError(f"{shown} failed: {reason}")
        return out


def end(process):
    """Kill a process and what it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
    else:  # Windows
        process.kill()
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
        pipe.close()
