"""Every layout against a worked example, written out by hand from FLM-Audio's figure 3 and section 3."""
import dataclasses

import numpy as np
import pytest

from files.tokenizer import load_tokenizer, make_tokenizer
from streams import (K, LISTEN, ROWS, SPEAK, STREAMS, TEXT, Utterance, Vocab, asr, asr_response_tts, delay,
                     free_response_tts, given, language, pack, recorded, response_tts, tts, word_aligned)

# words 0..9, <wait> W, <asr> A, <answer> R; codes 0..63, empty E; silence starts with 1, then repeats 0
W, A, R, E = 10, 11, 12, 64
V = Vocab.own(13, 64, ((1,) * K, (0,) * K))


def said(tokens, first, frames, tail=0, starts=None):
    """Frames of speech with the codes first, first+1, ...; then a tail of 9s."""
    codes = [first + i for i in range(frames)] + [9] * tail
    return Utterance(tokens, np.repeat(np.array(codes)[:, None], K, 1), frames, starts)


USER = said([3, 4], 20, 3, tail=1)
MODEL = said([5, 6, 7], 30, 5, tail=1, starts=[0, 2, 3])


def check(grid, text, speak, listen):
    """speak, listen: the one code that all K rows of the channel have in each frame."""
    assert grid.shape == (ROWS, len(text))
    assert grid[TEXT].tolist() == text
    for row in grid[SPEAK]:
        assert row.tolist() == speak
    for row in grid[LISTEN]:
        assert row.tolist() == listen


def test_the_specials_are_the_last_three():
    assert (V.wait, V.asr, V.answer, V.empty) == (W, A, R, E)


def test_language_alone():
    check(language([(USER, MODEL), (said([8], 40, 2), said([9], 50, 2))], V),
          text=[A, 3, 4, R, 5, 6, 7, W, A, 8, R, 9, W],
          speak=[E] * 13,
          listen=[E] * 13)


def test_tts_style():
    check(tts(MODEL, V),
          text=[5, 6, 7, W, W, W, W, W],
          speak=[E, E, 30, 31, 32, 33, 34, 9],  # two frames after the start of the text
          listen=[E] * 8)


def test_asr_style():
    check(asr(USER, V),
          text=[W, W, W, 3, 4],  # immediately after the three frames of speech
          speak=[E] * 5,
          listen=[20, 21, 22, 9, E])


def test_asr_response_tts():
    check(asr_response_tts([(USER, MODEL)], [2], V),
          text=[W, W, W, W, W, A, 3, 4, R, 5, 6, 7, W, W, W, W],
          speak=[0] * 11 + [30, 31, 32, 33, 34],
          listen=[1, 0, 20, 21, 22, 9] + [0] * 10)


def test_response_tts():
    check(response_tts([(USER, MODEL)], [2], V),
          text=[W, W, W, W, W, 5, 6, 7, W, W, W, W],
          speak=[0] * 7 + [30, 31, 32, 33, 34],
          listen=[1, 0, 20, 21, 22, 9] + [0] * 6)


def test_response_tts_with_two_turns():
    check(response_tts([(USER, MODEL), (USER, said([8], 40, 1))], [0, 1], V),
          text=[W, W, W, 5, 6, 7, W, W, W, W, W, W, W, W, 8, W, W],
          speak=[0] * 5 + [30, 31, 32, 33, 34, 9] + [0] * 5 + [40],
          listen=[20, 21, 22, 9] + [0] * 7 + [20, 21, 22, 9, 0, 0])


def test_free_user_input_stops_text_and_audio_half_a_second_after_it_begins():
    long = said([5] * 12, 30, 14)
    loud = said([8], 20, 8)
    check(free_response_tts([(USER, long), (loud, MODEL)], [0, 0], [3, None], [None, None], V),
          #     user       answer begins     interruption from frame 8; silent from frame 8 + 6
          text=[W, W, W] + [5] * 11 + [W, W] + [5, 6, 7] + [W] * 4,
          speak=[0] * 5 + [30 + i for i in range(9)] + [0] * 4 + [30, 31, 32, 33, 34],
          listen=[20, 21, 22, 9, 0, 0, 0, 0] + [20 + i for i in range(8)] + [0] * 7)


def test_free_user_input_after_the_answer_is_response_tts():
    turns, gaps = [(USER, MODEL), (USER, MODEL)], [1, 2]
    free = free_response_tts(turns, gaps, [None, None], [None, None], V)
    assert (free == response_tts(turns, gaps, V)).all()


def test_a_users_backchannel_changes_nothing_but_the_listen_rows():
    turns, gaps = [(USER, MODEL)], [1]
    plain = response_tts(turns, gaps, V)
    backchannel = free_response_tts(turns, gaps, [None], [(2, said([], 50, 2))], V)
    assert (plain[:LISTEN.start] == backchannel[:LISTEN.start]).all()
    check(backchannel, text=[W, W, W, W, 5, 6, 7, W, W, W, W], speak=[0] * 6 + [30, 31, 32, 33, 34],
          listen=[1, 20, 21, 22, 9, 0, 0, 0, 50, 51, 0])


def test_an_echo_is_heard_while_the_model_speaks_and_not_after_it_is_cut_off():
    echo = np.full((5, K), 60)
    heard = dataclasses.replace(MODEL, echo=echo)
    plain, grid = (response_tts([(USER, model)], [2], V) for model in (MODEL, heard))
    assert (plain[:LISTEN.start] == grid[:LISTEN.start]).all()
    assert grid[LISTEN][0].tolist() == [1, 0, 20, 21, 22, 9, 0] + [60] * 5
    long = dataclasses.replace(said([5] * 12, 30, 14), echo=np.full((14, K), 60))
    grid = free_response_tts([(USER, long), (said([8], 20, 2), MODEL)], [0, 0], [3, None], [None, None], V)
    assert grid[LISTEN][0].tolist() == [20, 21, 22, 9, 0] + [60] * 3 + [20, 21] + [60] * 4 + [0] * 3


def test_what_the_model_says_while_the_user_speaks():
    """Its text comes two frames before its audio, as always; the answer is unchanged."""
    long = dataclasses.replace(said([8], 20, 7), interjections=((3, said([9], 50, 2)),))
    check(response_tts([(long, MODEL)], [0], V),
          text=[W, 9, W, W, W, W, W, 5, 6, 7, W, W, W, W],
          speak=[0, 0, 0, 50, 51, 0, 0, 0, 0, 30, 31, 32, 33, 34],
          listen=[20, 21, 22, 23, 24, 25, 26] + [0] * 7)


def test_word_aligned():
    check(word_aligned([(USER, MODEL)], [1], V),
          text=[W, W, W, W, W, W, 5, W, 6, 7, W],  # each with its own audio: frames 0, 2 and 3 of the answer
          speak=[0] * 6 + [30, 31, 32, 33, 34],
          listen=[1, 20, 21, 22, 9] + [0] * 6)


def test_acoustic_codes_enter_one_frame_late():
    grid = np.arange(ROWS * 4).reshape(ROWS, 4)
    late = delay(grid, -1)
    for row in range(ROWS):
        expected = grid[row].tolist() if row in (0, 1, 9) else [-1, *grid[row, :3].tolist()]
        assert late[row].tolist() == expected, row


def undelay(grid):
    """The inverse of delay. The last max(delay) columns are not whole yet and are left out: (17, T) -> (17, T
    - 1)."""
    late = max(s.delay for s in STREAMS)
    T = grid.shape[1] - late
    return np.concatenate([grid[s.start:s.stop, s.delay:s.delay + T] for s in STREAMS])


def test_undelay_is_the_inverse():
    grid = np.random.default_rng(0).integers(0, 64, (ROWS, 20))
    assert (undelay(delay(grid, E)) == grid[:, :19]).all()


def test_pack_joins_cuts_and_delays():
    a, b = tts(MODEL, V), asr(USER, V)
    packed, loss = pack([a, b], 10, V)
    assert loss.all()
    assert packed.shape == (ROWS, 10)
    assert packed[TEXT].tolist() == [5, 6, 7, W, W, W, W, W, W, W]
    assert packed[SPEAK.start].tolist() == [E, E, 30, 31, 32, 33, 34, 9, E, E]
    assert packed[SPEAK.start + 1].tolist() == [E, E, E, 30, 31, 32, 33, 34, 9, E]
    assert packed[LISTEN.start].tolist() == [E] * 8 + [20, 21]


def test_what_is_given_is_read_but_carries_no_loss():
    """Every entry is marked by its own row's delay: the acoustic codes' a frame later than the others."""
    grid = tts(MODEL, V)
    grid[TEXT, :2], grid[SPEAK, 2:4] = given(grid[TEXT, :2]), given(grid[SPEAK, 2:4])
    packed, loss = pack([grid], 9, V)
    plain, _ = pack([tts(MODEL, V)], 9, V)
    assert (packed == plain).all()
    assert [np.flatnonzero(~row).tolist() for row in loss] == [[0, 1], [2, 3], *[[3, 4]] * 7, *[[]] * 8]


def test_a_recorded_conversation():
    listen, speak = said([], 20, 10).codes, said([], 40, 10).codes
    check(recorded(listen, speak, [(1, [3], None), (4, [5, 6, 7], 9), (5, [8, 9, 9], 6)], V),
          # at once; two frames ahead; when the one before is written, and cut off
          text=[3, W, 5, 6, 7, 8, W, W, W, W],
          speak=[40 + i for i in range(10)], listen=[20 + i for i in range(10)])


def test_tokenizer_specials_follow_the_words():
    t = make_tokenizer({bytes([b]): b for b in range(256)}, r"\S+|\s+")
    assert t.encode("<wait>", allowed_special="all") == [256]
    assert t.decode(t.encode_ordinary("héllo 你好")) == "héllo 你好"
    assert t.encode_ordinary("<answer>") == list(b"<answer>")  # a user's text never becomes a special token


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"ranks": {"%%": 1}, "pattern": "x"}', '{"ranks": 3, "pattern": "x"}'])
def test_a_damaged_tokenizer_file_is_a_clear_error(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: (not a tokeniser|is not JSON)"):
        load_tokenizer(path)
