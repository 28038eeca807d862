"""The commands of prepare.py that read speech or text which exists already: name, function, what it does,
example, flags (name, default or ... if it must be given, help)."""
import functools

from corpora.chats import import_chats
from corpora.dialogues import speak_dialogues
from corpora.minimind import import_minimind
from corpora.mix import mix
from corpora.readers import READERS, collect
from corpora.transcribe import transcribe
from corpora.words import make_words

OUT, SEED = ("--out", ..., "folder to write"), ("--seed", 1, "of all random choices")
TTS = ("--tts", None, "another synthesiser than espeak-ng: a command with {text}, {voice} and {out}")


def reader(corpus):
    """collect for a corpus, with the docstring of its reader."""
    return functools.wraps(READERS[corpus], ("__doc__",))(functools.partial(collect, corpus))


CORPORA = (
    ("words", make_words, "recordings of single words -> the toy world in people's voices",
     "SpeechCommands --out data/people", (
        ("source", ..., "folder with the recordings, in the layout of Speech Commands or of the "
                        "free-spoken-digit-dataset"), OUT,
        ("--lang", "en", "language of the words"),
        ("--items", 4000, "dialogues to train on"),
        ("--sentences", 4000, "user sentences to train on; of the model, a fourth as many"),
        ("--tests", 120, "held-out dialogues of known speakers, and as many of those held out"),
        ("--hold-out", "", "speakers that are never trained on, with commas"),
        ("--others", "", "beside espeak-ng's, voices for the words that a speaker has not recorded, as in "
                         "prepare.py toy"), SEED, TTS)),
    ("chats", import_chats, "published text conversations -> written dialogues",
     "sharegpt.json --out dialogues.jsonl", (
        ("source", ..., "a .json or .jsonl in the layout of ShareGPT, OpenAI, Alpaca or UltraChat"),
        ("--out", ..., "the .jsonl to write"),
        ("--longest", 80, "words of a turn"), ("--lang", "en", "language of all of them"))),
    ("speak", speak_dialogues, "written dialogues -> spoken ones", "dialogues.jsonl --out data/mine", (
        ("source", ..., "the .jsonl of the dialogues"), OUT, ("--voices", 24, "user voices"),
        ("--tts-voices", None, "file with the voices, one a line, the model's first"), SEED, TTS)),
    ("librispeech", reader("librispeech"), "LibriSpeech -> a manifest",
     "LibriSpeech --out data/libri", (("source", ..., "folder with *.trans.txt somewhere below"), OUT)),
    ("ljspeech", reader("ljspeech"), "LJSpeech -> a manifest",
     "LJSpeech-1.1 --out data/lj", (("source", ..., "folder with metadata.csv"), OUT)),
    ("conversations", reader("conversations"), "stereo conversations -> a manifest",
     "talks.jsonl --out data/talks", (("source", ..., "the .jsonl in moshi-finetune's format"), OUT)),
    ("minimind", import_minimind, "MiniMind-O's spoken dialogues -> a manifest",
     "sft_a2a.parquet --out data/mm", (("source", ..., "a .parquet of MiniMind-O"), OUT)),
    ("transcribe", transcribe, "recordings without text -> a manifest",
     "recordings --asr 'whisper-cli -nt {wav}' --out data/mine", (
        ("source", ..., "folder with audio files at any depth"), OUT,
        ("--asr", ..., "a command with {wav} that prints what it hears"),
        ("--lang", "en", "language of the recordings"),
        ("--skip-broken", False, "skip files that cannot be read or transcribed"))),
    ("mix", mix, "dialogues -> conversations with interruptions, noise, gain and leakage",
     "--data data/toy --out data/mixed --noise ~/noise", (
        ("--data", "data/toy", "folder with the manifest of the dialogues"),
        ("--out", "data/mixed", "folder to write"),
        ("--conversations", 2000, "how many"),
        ("--noise", None, "folder with audio files of noise at any depth (default: generated)"), SEED)),
)
