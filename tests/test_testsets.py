"""eval.py on a test set of one's own, with a model whose answers are known and with an untrained one."""
import json
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from chat import DuplexModel
from conftest import ROOT, run
from evals import testsets
from evals.testsets import BEFORE, contains, normalise, say, transcribe, units
from files.audio import SAMPLE_RATE, read_audio, write_audio
from mimi import FRAME
from streams import DELAYED, K, LISTEN, TEXT, TEXT_LEAD, Vocab

WORDS = ["<wait>", "the", "cat", "is", "red", "moon", "你", "好", "吗"]
EMPTY = 32


class Parrot:
    """Stands in for a DuplexModel: writes the words of a clip when it is over, speaks each word that is
    written for it, and answers what it hears with the same words. A word is four frames of its own loudness.
    lost: the number of words at the end that it forgets; late: frames before it begins to write."""
    device, delayed, silence = torch.device("cpu"), DELAYED, torch.zeros(K, dtype=torch.long)

    def __init__(self, lost=0, late=0):
        self.lost, self.late, self.columns = lost, late, []
        self.vocab = Vocab(len(WORDS), 0, -1, -1, EMPTY, EMPTY, ((0,) * K,))
        spaced = lambda i: WORDS[i] if i > 5 else " " + WORDS[i]
        self.tokenizer = types.SimpleNamespace(
            name="published", decode_single_token_bytes=lambda i: spaced(i).encode(),
            encode_ordinary=ids)
        self.codec = types.SimpleNamespace(
            encode=lambda wav: loudness(wav.unflatten(-1, (-1, FRAME)).abs().mean(-1)).repeat(1, K, 1),
            decode_step=lambda codes, state: codes[:, :1].repeat(1, 1, FRAME) / 100)
        self.model = types.SimpleNamespace(init_cache=lambda B: [[] for _ in range(B)], step=self.step,
                                           hidden_step=self.hidden_step, text_logits=lambda h: h)

    def hidden_step(self, column, cache):
        out = []
        for heard, code in zip(cache, column[:, LISTEN.start].tolist()):
            if code not in (0, EMPTY) and (not heard or heard[-1] != code):
                heard.append(code)
            elif code == EMPTY and heard and heard[0] != "over":
                heard[:] = ["over"] + [0] * self.late + heard[:len(heard) - self.lost]
            out.append(heard.pop(1) if len(heard) > 1 and heard[0] == "over" else 0)
        return F.one_hot(torch.tensor(out), len(WORDS)).float()

    def step(self, column, cache, sample_text, sample_code):
        self.columns.append(column.clone())
        codes = []
        for queue, token in zip(cache, column[:, TEXT].tolist()):
            queue += ([] if queue else [0]) + [token] * 4 if token else []
            codes.append(queue.pop(0) if queue else 0)
        logits = F.one_hot(torch.tensor(codes), EMPTY).float()
        return sample_text(None), torch.stack([sample_code(logits, k) for k in range(K)], 1)

    def init_state(self, seeds):
        return types.SimpleNamespace(cache=[[] for _ in seeds], codec=None, failed=torch.tensor(False))

    def sample_code(self, logits, k, state):
        return logits.argmax(-1)

    def converse(self, wav, seed=1, each=lambda t, text: None):
        texts = torch.zeros(len(wav), -(-wav.shape[1] // FRAME), dtype=torch.long)
        said = torch.zeros_like(wav)
        for text, out, x in zip(texts, said, wav):
            end = int(x.nonzero()[-1]) // FRAME + 1
            for i, word in enumerate(heard_words(x)):
                text[end + i] = word
                out[(end + 4 * i) * FRAME:][:4 * FRAME] = word / 100
        return texts, said


def loudness(x):
    return (x * 100).round().long()


def heard_words(wav):
    return [i for i in loudness(wav[FRAME // 2::FRAME]).unique_consecutive().tolist() if i]


def ids(text):
    return [WORDS.index(unit) for unit in units(text)[1]]


def clip(text):
    return torch.tensor(ids(text)).float().repeat_interleave(4 * FRAME) / 100


ASR = """import sys, soundfile
words = %r
x, _ = soundfile.read(sys.argv[1])
ids = [round(v * 100) for v in x[960::1920]]
print(' '.join(words[i] for i, last in zip(ids, [0, *ids]) if i and i != last))
""" % (WORDS,)


@pytest.fixture
def asr(tmp_path):
    (tmp_path / "asr.py").write_text(ASR)
    return f"{sys.executable} {tmp_path / 'asr.py'} {{wav}}"


TEXTS = ["the cat is red", "the red moon is the moon", "cat is cat", "你好吗"]


@pytest.fixture
def recordings(tmp_path):
    """A folder with a manifest of TEXTS, written as people write, and of one line to train on."""
    folder = tmp_path / "set"
    written = ["The cat is red.", "The red moon is... the MOON!", "“cat is cat”", "你好吗？"]
    lines = [{"audio": f"{i}.wav", "text": text} for i, text in enumerate(written)]
    for i, text in enumerate(TEXTS):
        write_audio(str(folder / f"{i}.wav"), clip(text))
    lines.append({"audio": "0.wav", "text": "moon", "split": "train"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(d) + "\n" for d in lines))
    return folder


def evaluate(monkeypatch, parrot, out, *args):
    monkeypatch.setattr(DuplexModel, "load", staticmethod(lambda *args, **kwargs: parrot))
    return run("eval.py", "--checkpoint", "parrot", "--keep", out, *args)


def read_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_text_is_compared_without_case_and_punctuation():
    words = normalise("“It's 5 o’clock,” SHE said -- twice…")
    assert words == ["it's", "5", "o'clock", "she", "said", "twice"]
    assert units("你好，world！") == ("CER", list("你好world"))
    assert units("Zwölf, ja?") == ("WER", ["zwölf", "ja"])
    assert units("ni hao", like="你好")[0] == "CER" and normalise("…!") == []


@pytest.mark.parametrize("reply, answers, right", [
    ("It is Paris, of course.", ["paris"], True), ("a comparison", ["Paris"], False),
    ("the river seine", ["The Rhine", "river Seine"], True), ("", ["x"], False),
    ("是北京。", ["北京"], True), ("twelve", ["one", "two"], False)])
def test_an_answer_is_contained_word_for_word(reply, answers, right):
    assert contains(reply, answers) == right


def test_transcripts_of_clips_of_any_length_in_one_batch():
    texts = ["the cat is red", "moon", " ".join(["cat is"] * 30)]
    clips = [clip(t) for t in texts]
    for late in (0, 20):  # 60 words take more frames than AFTER; a long clip has more
        assert transcribe(Parrot(late=late), clips) == [" " + t for t in texts]
    together = transcribe(Parrot(late=testsets.QUIET + 1), clips)
    assert together == ["", "", ""], "after two seconds of <wait> a transcript is over"


def test_hearing_counts_errors(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "get_recogniser", None)  # neither it nor the toy world is needed
    for lost, words, letters, exactly in ((0, "1.000", "1.000", "1.000"), (1, "0.769", "0.667", "0.000")):
        code, out, err = evaluate(monkeypatch, Parrot(lost), tmp_path / "out", "--hear", recordings)
        assert code == 0, err
        line = lambda name: next(x.split() for x in out.splitlines() if x.startswith(f"  {name}"))
        assert line("hearing 1 - WER")[4] == words and line("hearing 1 - WER")[8] == "13"
        assert line("hearing 1 - CER")[4] == letters and line("hearing 1 - CER")[8] == "3"
        assert line("hearing exactly")[2] == exactly and line("hearing exactly")[-1] == "4"
        assert out.splitlines()[-1] == f"Wrote {tmp_path}/out/heard.jsonl"
    lines = read_lines(tmp_path / "out/heard.jsonl")
    assert {d["found"].strip() for d in lines} == {"the cat is", "the red moon is the", "cat is", "你好"}


def test_the_manifest_of_an_encoded_folder_is_found(recordings, tmp_path, monkeypatch):
    (recordings / "encoded").mkdir()
    (recordings / "encoded/meta.json").write_text("{}")
    code, out, err = evaluate(monkeypatch, Parrot(), tmp_path, "--hear", recordings / "encoded", "--items", 3)
    assert code == 0 and " of 3" in out, err


def test_speech_follows_the_layout_and_ends_in_silence():
    for post_trained, nothing in ((False, 0), (True, EMPTY)):
        parrot = Parrot()
        short, long = say(parrot, ["cat", "the red moon is the moon"], post_trained=post_trained)
        assert heard_words(short) == [2] and heard_words(long) == [1, 4, 5, 3, 1, 5]
        assert len(short) == (4 + 3) * FRAME and len(long) == (6 * 4 + 3) * FRAME
        grid = torch.stack(parrot.columns, -1)
        assert grid[0, TEXT, :BEFORE + 2].tolist() == [0] * BEFORE + [2, 0]
        start = BEFORE + TEXT_LEAD
        assert (grid[:, 1, :start] == nothing).all() and (grid[:, 2:9, :start + 1] == nothing).all()
        assert (grid[0, 1, start:start + 4] == 2).all() and (grid[:, LISTEN] == nothing).all()


def test_saying_is_judged_by_a_recogniser(recordings, tmp_path, monkeypatch, asr):
    code, out, err = evaluate(monkeypatch, Parrot(), tmp_path / "out", "--say", recordings, "--asr", asr)
    assert code == 0, err
    assert "saying 1 - WER               1.000 [0.77, 1.00] of 13   WER 0.000" in out
    assert "saying 1 - CER               1.000 [0.44, 1.00] of 3   CER 0.000" in out
    lines = read_lines(tmp_path / "out/said/said.jsonl")
    assert [d["audio"] for d in lines] == [f"0000{i}.wav" for i in range(1, 5)]
    assert heard_words(read_audio(str(tmp_path / "out/said/00001.wav"))) == [1, 2, 3, 4]


def ask(folder, *questions):
    for name, text in (("a.wav", "the red moon"), ("b.wav", "你好")):
        write_audio(str(folder / name), clip(text))
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder / "q.jsonl"


def test_questions_are_answered_and_judged(tmp_path, monkeypatch, asr):
    speaker = tmp_path / "tts.py"
    paths = [ROOT, os.path.dirname(__file__)]
    speaker.write_text(f"import sys\nsys.path[:0] = {paths!r}\nfrom test_testsets import clip, write_audio\n"
                       "write_audio(sys.argv[2], clip(sys.argv[1]))\n")
    monkeypatch.setattr(testsets.toy.voices, "normalise", lambda x: x)
    judge = tmp_path / "judge.py"
    judge.write_text("import json, sys\nd = json.load(sys.stdin)\n"
                     "print('I give it', 7.5 if d['answers'][0] in d['reply'] else 2)")
    path = ask(tmp_path, {"audio": "a.wav", "text": "What?", "answers": ["Red Moon!"]},
               {"audio": "b.wav", "answers": ["好"]}, {"audio": "a.wav", "answers": ["blue", "sun"]},
               {"text": "cat is cat", "answers": ["cat is"]})
    code, out, err = evaluate(monkeypatch, Parrot(), tmp_path / "out", "--ask", path, "--asr", asr, "--judge",
                              f"{sys.executable} {judge}", "--tts",
                              f"{sys.executable} {speaker} {{text}} {{out}}")
    assert code == 0, err
    for name in ("written", "spoken "):
        assert f"answers, {name}             0.750 [0.30, 0.95] of 4" in out
    assert "mean of 4" in out and "4.750 [" in out  # 2, 7.5, 2, 7.5: "Red Moon!" is not in the reply as it is
    lines = read_lines(tmp_path / "out/asked.jsonl")
    assert sorted((d["reply"], d["right"], d["mark"]) for d in lines) == [
        ("cat is cat", True, 7.5), ("the red moon", False, 2.0), ("the red moon", True, 2.0),
        ("你好", True, 7.5)]


def bench(folder):
    """Full-Duplex-Bench as it is downloaded: one recording each of v1 and of v1.5."""
    quiet = torch.zeros(SAMPLE_RATE // 2)
    request, other = clip("the cat is red moon is cat is red moon is the cat"), clip("moon is red moon")
    item, turn = folder / "v1_5/user_interruption/7", folder / "v1_0/candor_turn_taking/3"
    clean = torch.cat([request, quiet, 0 * other, *[quiet] * 8])
    write_audio(str(item / "clean_input.wav"), clean)
    write_audio(str(item / "input.wav"), torch.cat([request, quiet, other, *[quiet] * 8]))
    begin = (len(request) + len(quiet)) / SAMPLE_RATE
    (item / "metadata.json").write_text(json.dumps({"timestamps": [begin, begin + 1.28]}))
    write_audio(str(turn / "input.wav"), torch.cat([request, *[quiet] * 8]))
    (turn / "turn_taking.json").write_text(json.dumps([{"timestamp": [len(request) / SAMPLE_RATE, 9]}]))
    return folder


def test_full_duplex_bench_is_held_and_scored(tmp_path, monkeypatch):
    folder = bench(tmp_path / "bench")
    code, out, err = evaluate(monkeypatch, Parrot(), tmp_path / "ours", "--folder", folder)
    assert code == 0 and out.splitlines()[-1] == f"Wrote what it said to {tmp_path}/ours/bench/", err
    for name in ("v1_5/user_interruption/7/output.wav", "v1_5/user_interruption/7/clean_output.wav",
                 "v1_0/candor_turn_taking/3/output.wav", "v1_0/candor_turn_taking/3/reply.jsonl"):
        assert (tmp_path / "ours/bench" / name).exists() and not (folder / name).exists()
    assert "TOR                          1.000 [0.21, 1.00] of 1" in out
    # without the event it would speak on, and with it, it waits until that is over
    assert "eligible                     1.000" in out and "TTR                          1.000" in out
    again, kept, _ = run("eval.py", "--folder", tmp_path / "ours/bench")
    assert again == 0 and kept.splitlines()[:12] == out.splitlines()[:12]
    code, _, err = evaluate(monkeypatch, Parrot(), tmp_path / "ours", "--folder", folder)
    assert code == 1 and "output.wav: is there already" in err.splitlines()[-1]
    code, out, err = evaluate(monkeypatch, Parrot(), tmp_path / "one", "--folder",
                              folder / "v1_5/user_interruption")
    assert code == 0 and "TTR                          1.000" in out, err


def no_words(folder):
    path = folder / "manifest.jsonl"
    path.write_text(path.read_text() + json.dumps({"audio": "0.wav", "text": " ... "}) + "\n")


def only_training(folder):
    (folder / "manifest.jsonl").write_text('{"audio": "0.wav", "text": "moon", "split": "train"}\n')


@pytest.mark.parametrize("flag, change, says", [
    ("--hear", no_words, "manifest.jsonl, line 6: a text has no words"),
    ("--say", no_words, "manifest.jsonl, line 6: a text has no words"),
    ("--hear", only_training, "holds no recording of user or either that is not for training"),
    ("--hear", lambda f: (f / "manifest.jsonl").unlink(), "manifest.jsonl: no such manifest"),
    ("--hear", lambda f: (f / "0.wav").unlink(), "no audio file"),
    ("--hear", lambda f: (f / "0.wav").write_bytes(b"RIFF"), "0.wav: not an audio file"),
    ("--say", lambda f: None, "name another recogniser with --asr")])
def test_a_test_set_that_cannot_be_used_is_one_line(recordings, tmp_path, monkeypatch, flag, change, says):
    change(recordings)
    code, _, err = evaluate(monkeypatch, Parrot(), tmp_path, flag, recordings, "--data", tmp_path / "nowhere")
    assert code == 1 and says in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: "), err


GOOD = {"audio": "a.wav", "answers": ["x"]}


@pytest.mark.parametrize("question, flags, says", [
    ({"audio": "a.wav"}, (), "q.jsonl, line 1: needs the field 'answers'"),
    ({"audio": "a.wav", "answers": []}, (), "line 1: needs the field 'answers'"),
    ({"audio": "a.wav", "answers": ["?"]}, (), "line 1: needs the field 'answers'"),
    ({"answers": ["x"]}, (), 'line 1: is not {"audio" or "text"'), ([], (), "line 1: is not"),
    ({"audio": "c.wav", "answers": ["x"]}, (), "line 1: "),
    (GOOD, ("--judge", "echo none"), "--judge echo none failed: it printed no number"),
    (GOOD, ("--judge", "/no/such"), "--judge /no/such: cannot be run"),
    (GOOD, ("--asr", "/no/such {wav}"), "cannot be run"), (GOOD, ("--asr", "false {wav}"), "failed"),
    (GOOD, ("--asr", "words"), "{wav} does not occur")])
def test_questions_and_commands_that_fail_are_one_clear_line(tmp_path, monkeypatch, question, flags, says):
    code, _, err = evaluate(monkeypatch, Parrot(), tmp_path / "out", "--ask", ask(tmp_path, question), *flags)
    assert code == 1 and says in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: "), err
    assert not (tmp_path / "out/asked.jsonl").exists()


def test_an_untrained_model_through_the_command_line(world, tmp_path):
    (tmp_path / "asr.py").write_text("print('one two')")
    asr = f"{sys.executable} {tmp_path / 'asr.py'} {{wav}}"
    for flag, more, file in (("--hear", (), "heard.jsonl"), ("--say", ("--asr", asr), "said/said.jsonl"),
                             ("--say", ("--asr", asr, "--post-trained"), "said/said.jsonl")):
        code, out, err = run("eval.py", "--checkpoint", world / "flm", flag, world / "toy", "--items", 3,
                             "--keep", tmp_path, *more)
        assert code == 0 and len(read_lines(tmp_path / file)) == 3, err
        assert "WER" in out and "exactly" in out


def test_chat_says_a_sentence(world, tmp_path):
    code, out, err = run("chat.py", "--checkpoint", world / "flm", "--say", "cat red moon", "--out",
                         tmp_path / "said.wav")
    assert code == 0 and out.startswith(f"Wrote {tmp_path}/said.wav ("), err
    assert 0 < len(read_audio(str(tmp_path / "said.wav"))) < 7 * SAMPLE_RATE
    for text, target, says in (("", "x.wav", "no words"), ("...", "x.wav", "no words"),
                               ("cat", "x.nothing", "cannot write")):
        code, _, err = run("chat.py", "--checkpoint", world / "flm", "--say", text, "--out",
                           tmp_path / target)
        assert code == 1 and len(err.splitlines()) == 1 and says in err
