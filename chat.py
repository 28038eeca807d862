"""Talk to it: one step of conversation, from 80 ms heard to 80 ms said (FLM-Audio, section 2), and the loop
over a file.

    80 ms of audio --codec--> 8 codes heard --.
    text and codes it said in this frame -----+--> column t --model--> text and codes of column t+1
                                              '--- 8 codes said --codec--> 80 ms of audio

The model listens while it speaks: every frame goes both ways. An answer to what was heard up to the end of
frame t can be played in frame t+1 at the earliest, and that is where it stands in the reply.

    python chat.py --checkpoint out/tiny --input user.wav --output reply.wav [--stereo] [--picture reply.png]
    python chat.py --checkpoint out/tiny --web       in the browser
    python chat.py --checkpoint out/tiny --mic       in the terminal
    python chat.py --checkpoint out/tiny --say "cat red moon" --output said.wav       read aloud, TTS style

B conversations in a batch, K codebooks, N samples, T frames.
"""
import argparse
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE, check_output, read_blocks, regroup, seconds_of, write_audio, write_blocks
from files.checkpoint import check_together
from files.device import check_device
from files.tokenizer import load_tokenizer
from kernels.sampling import Sampling, sample
from layouts.prompts import make_prompt
from layouts.typed import typed_tokens
from live.float8 import Float8Cache
from live.graph import compile_and_capture
from live.transcript import PrintedTranscript
from live.weights import by_columns, quantise
from mimi import FRAME, Mimi, tensors
from model import FLM, KVCache
from published.release import find_codec, is_release, load_to_talk
from streams import DELAYED, FRAME_RATE, K, LISTEN, ROWS, SPEAK, TEXT

RECENT = 50  # frames that the repetition penalties look back on


# ------------------------------------------------------------------------------------------------------------
# one step of conversation


@dataclass
class ConversationState:
    """The memory of B conversations between one frame and the next. A step changes it in place."""
    cache: KVCache  # of the temporal transformer
    codec: dict
    text: torch.Tensor  # (B,) the text token of the next column
    speak: torch.Tensor  # (B, K) its speak codes
    listen: torch.Tensor  # (B, K) codes of the last frame heard; the delayed ones have yet to enter the grid
    recent: torch.Tensor  # (B, 1 + K, RECENT) the last text tokens and codes, -1 for none; see sample
    seed: torch.Tensor  # (B,) of the random numbers
    failed: torch.Tensor  # (B,) whether logits were NaN or infinite

    def small_tensors(self):
        """All tensors but the KV cache. Restoring them undoes a step: the position is restored too, so the
        next step writes to the same place of the cache, and attention masks that place until then."""
        return [*tensors({**vars(self), "cache": self.cache.position})]


class DuplexModel:
    """A model with its codec and tokeniser, and how to sample: all that a conversation needs."""

    def __init__(self, model, vocab, codec, tokenizer, text=Sampling(), audio=Sampling(), release=False):
        """audio: how to sample every code, or K of them, one for each. release: as the FLM-Audio release, it
        starts without codes rather than in silence, and the repetition penalty counts <wait> as a word."""
        self.device = model.head.weight.device
        # On a GPU a step takes as long as reading the weights, and bfloat16 halves their size.
        self.model = model
        if self.device.type == "cuda":
            model.bfloat16().depth.align()
        else:
            by_columns(model)
        self.vocab, self.codec, self.tokenizer, self.release = vocab, codec, tokenizer, release
        self.sampling = [text, *([audio] * K if isinstance(audio, Sampling) else audio)]
        self.delayed = DELAYED.to(self.device)
        self.silence = torch.tensor(vocab.silence[-1], device=self.device)
        self.prompt = None  # (17, P) columns that every conversation begins with: layouts/prompts.py

    @staticmethod
    def load(folder, device="cpu", text=Sampling(), audio=Sampling(), codec=None):
        """From the folder that train.py wrote; or the FLM-Audio release, which samples in its own way.
        codec: another file than the folder's. Raises ValueError or OSError with the file's name."""
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder; --checkpoint names one that train.py wrote")
        if is_release(folder):
            return DuplexModel(**load_to_talk(folder, Mimi.load(codec or find_codec(folder), device)))
        model, vocab, _ = FLM.load(os.path.join(folder, "checkpoint.pt"), device)
        codec = Mimi.load(codec or os.path.join(folder, "codec.pt"), device)
        tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.json"))
        check_together(folder, vocab, codec.config, tokenizer)
        return DuplexModel(model, vocab, codec, tokenizer, text, audio)

    def init_state(self, seeds):
        """The state at the start of B = len(seeds) conversations."""
        B, v = len(seeds), self.vocab
        full = lambda value, *shape: torch.full((B, *shape), value, device=self.device)
        pad = v.codebook_size  # before the first code; in our own models the same as "empty"
        speak = torch.where(self.delayed | self.release, pad, self.silence).repeat(B, 1)
        state = ConversationState(self.model.init_cache(B), self.codec.init_state(B), full(v.wait), speak,
                                  listen=full(pad, K), recent=full(-1, 1 + K, RECENT),
                                  seed=torch.tensor(list(seeds), device=self.device), failed=full(False))
        for row in range(B) if self.prompt is not None else ():
            self.prefill(state, row, self.prompt)
        return state

    @torch.inference_mode()
    def prefill(self, state, row, prompt):
        """Begin conversation `row` with a prompt (17, P), all columns at once; no other row changes."""
        self.model.hidden(torch.as_tensor(prompt, device=self.device)[None], state.cache.row(row))

    @torch.inference_mode()
    def step(self, wav, state):
        """One frame both ways: (B, 1, 1920) heard -> text tokens (B,), (B, 1, 1920) said. Updates the state.
        Nothing here waits for the device, so all of it can be captured as one CUDA graph."""
        codes = self.codec.encode_step(wav, state.codec)[..., 0]
        column = torch.empty(len(wav), ROWS, dtype=torch.long, device=self.device)
        column[:, TEXT], column[:, SPEAK] = state.text, state.speak
        column[:, LISTEN] = torch.where(self.delayed, state.listen, codes)
        text, speak = self.model.step(column, state.cache, lambda logits: self.sample_text(logits, state),
                                      lambda logits, k: self.sample_code(logits, k, state))
        frame = torch.where(self.delayed, speak, state.speak)  # acoustic codes come one step later
        if self.release:  # its first frame is no codes
            frame = torch.where((frame < self.vocab.codebook_size).all(1, keepdim=True), frame, self.silence)
        for old, new in ((state.text, text), (state.speak, speak), (state.listen, codes)):
            old.copy_(new)
        return text, self.codec.decode_step(frame[..., None], state.codec)

    def sample_text(self, logits, state):
        return self.sample(logits[:, :self.vocab.text_size], 0, state)

    def sample_code(self, logits, k, state):
        return self.sample(logits[:, :self.vocab.codebook_size], 1 + k, state)  # never "empty"

    def sample(self, logits, row, state):
        """row: 0 for text, 1 + k for code k; each is a draw of its own and remembers its own last tokens."""
        how, recent = self.sampling[row], state.recent[:, row]
        token = self.draw(logits, how, row, recent, state)
        state.failed |= token < 0
        token = token.clamp(min=0)
        if how.penalty != 1:
            word = token if row or self.release else token.masked_fill(token == self.vocab.wait, -1)
            recent.copy_(torch.cat([recent[:, 1:], word[:, None]], 1))
        return token

    def draw(self, logits, how, row, recent, state):
        """Tokens (B,), -1 where logits are not numbers."""
        return sample(logits, how, state.seed, state.cache.position, row, recent)

    def compiled_step(self, state):
        """`step` of the audio alone; on a GPU one CUDA graph, whose results the next call overwrites."""
        step = lambda wav: self.step(wav, state)
        if self.device.type != "cuda":
            return step
        wav = torch.zeros(len(state.seed), 1, FRAME, device=self.device)
        return compile_and_capture(step, wav, state.small_tensors(), self.model, self.codec)

    def converse(self, wav, seed=1, each=lambda t, text: None, typed=()):
        """Whole conversations, frame by frame: (B, N) heard -> text tokens (B, T) and audio said (B, N), on
        one clock. each(t, text (B,)) is called after every frame. The seed of
        conversation b is seed + b. typed: tokens for the text row from its start (layouts/typed.py).
        ValueError if logits are NaN or infinite."""
        B, N = wav.shape
        frames = F.pad(wav, (0, -N % FRAME)).to(self.device).split(FRAME, -1)
        texts, audio = [], [frames[0].new_zeros(B, FRAME)]
        for t, (text, said) in enumerate(self.answer(frames, seed, B, typed)):
            each(t, text)
            texts.append(text)
            audio.append(said)
        return torch.stack(texts, 1).cpu(), torch.cat(audio, -1)[:, :N].cpu()

    def answer(self, frames, seed=1, B=1, typed=()):
        """The same for as many frames (B, 1920) as come: yields text tokens (B,) and audio (B, 1920) for
        each, to be heard beside the next one."""
        state = self.init_state(range(seed, seed + B))
        step = self.compiled_step(state)
        for t, frame in enumerate(frames):
            if t < len(typed):
                state.text.fill_(typed[t])
            text, said = step(frame[:, None])
            text = torch.full_like(text, self.vocab.wait) if t + 1 < len(typed) else text.clone()
            yield text, said[:, 0].clone()  # (where the next token is typed, the model's is not shown)
        if state.failed.any():
            raise ValueError("the model's logits are not numbers; its weights are damaged")


# ------------------------------------------------------------------------------------------------------------
# a conversation with a file


def talk_to_file(duplex, source, after, target, stereo, picture, seed, typed=()):
    """source: a file, or None if the user types; `after` frames of silence follow it. Writes the audio said
    to `target`, the monologue beside it as JSON lines, and a picture if wanted. Only a picture takes memory
    for the length of the file."""
    frames = math.ceil(seconds_of(source) * FRAME_RATE if source else 0) + after
    blocks = itertools.chain(read_blocks(source) if source else (), [torch.zeros(1, FRAME)] * after)
    transcript, begin = PrintedTranscript(duplex), time.perf_counter()
    said_before, n, kept = torch.zeros(1, FRAME), 0, []
    heard, fed = itertools.tee(regroup(blocks, FRAME))
    fed = (F.pad(x, (0, FRAME - x.shape[1])).to(duplex.device) for x in fed)
    with (write_blocks(target, 1 + stereo) as write,
          tqdm(total=frames, unit="frame", leave=False, disable=None) as bar):
        for t, ((text, said), x) in enumerate(zip(duplex.answer(fed, seed, typed=typed), heard)):
            transcript.add(t, text.item())
            both = torch.cat([x, said_before[:, :x.shape[1]]])
            write(both if stereo else both[1])
            said_before, n = said.cpu(), n + x.shape[1]
            kept += [both] * bool(picture)
            bar.update()
    seconds = time.perf_counter() - begin
    transcript.print_line()
    notes = os.path.splitext(target)[0] + ".jsonl"
    with replace_when_done(notes) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(piece, ensure_ascii=False) + "\n" for piece in transcript.pieces)
    where = f"{torch.get_num_threads()} thread(s)" if duplex.device.type == "cpu" else duplex.device.type
    speed = frames / seconds
    print(f"{frames} frames at {speed:.0f} a second: {speed / FRAME_RATE:.1f} times real time on {where}")
    if picture:
        from evals.plot import draw_conversation  # needs an extra
        draw_conversation(picture, *torch.cat(kept, 1), transcript.pieces)
    length = f"{n / SAMPLE_RATE:.2f} s{', left heard, right said' if stereo else ''}"
    print(f"Wrote {target} ({length}) and {notes}" + (f" and {picture}" if picture else ""))


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--checkpoint", default="out/tiny", help="folder that train.py wrote, or an FLM-Audio release")
    add("--codec", help="another codec than the folder's: for a release, Mimi as published")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--input", help="any audio file: what the user says")
    way.add_argument("--say", metavar="TEXT", help="what the model is to say, in TTS style")
    way.add_argument("--type", metavar="TEXT", help="what the user types instead of speaking")
    way.add_argument("--web", action="store_true", help="serve a page to talk on")
    way.add_argument("--mic", action="store_true", help="microphone and loudspeaker of this machine")
    add("--output", default="reply.wav", help="audio file for what the model says")
    add("--stereo", action="store_true", help="write both voices: left the user, right the model")
    add("--picture", help="draw the conversation into this file (.png, .svg)")
    add("--after", type=float, default=6.0, metavar="SECONDS",
        help="silence after what the user says, for the rest of the answer (default: 6)")
    add("--role", default="", help="text that the conversation begins with: layouts/prompts.py")
    add("--voice", metavar="FILE", help="audio that it begins with: the voice that the model is to have")
    add("--open", action="store_true", help="open the page of --web in a browser")
    add("--host", default="127.0.0.1", help="address for --web; any but this machine's own requires a token")
    add("--port", type=int, default=8000)
    add("--token", help="that the page's address must carry, or 'random', as where --host requires one")
    add("--sessions", type=int, default=4, help="conversations at once in --web")
    add("--weights", choices=("int8", "float8"),
        help="in eight bits, for models of `small`'s size and above: int8 on a CPU, float8 on a GPU")
    own = "(default: {}, or as the release does)"
    add("--temperature", type=float, help="of text and audio; 0 is greedy " + own.format(0))
    add("--top-k", type=int, help="sample from the k most probable tokens; 0 for all " + own.format(0))
    add("--top-p", type=float, help="sample from the most probable tokens that sum to p " + own.format(1))
    add("--penalty", type=float, help=f"on text tokens of the last {RECENT} frames " + own.format(1))
    add("--cache", choices=("float8",), help="keys and values in 8 bits: more conversations fit on a GPU")
    add("--seed", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    return parser


def main():
    args = build_parser().parse_args()
    try:
        given = lambda *names: {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        flags = given("temperature", "top_k", "top_p")
        Sampling(**flags, **given("penalty"))  # an error before the model is loaded
        if not 0 <= args.after <= 3600:
            raise ValueError(f"--after {args.after}: from 0 to 3600 seconds")
        after = round(args.after * FRAME_RATE)
        device = check_device(args.device)
        if args.input or args.say is not None or args.type is not None:
            check_output(args.output)
            if args.picture:
                from evals.plot import check_picture
                check_picture(args.picture)
        duplex = DuplexModel.load(args.checkpoint, device, codec=args.codec)
        if args.weights:
            quantise(duplex.model, args.weights)
        duplex.sampling = [replace(how, **flags) for how in duplex.sampling]
        duplex.sampling[0] = replace(duplex.sampling[0], **given("penalty"))
        if args.cache:
            duplex.model.layer_cache = Float8Cache
        if args.role or args.voice:
            duplex.prompt = make_prompt(duplex, args.role, args.voice)
        if args.web:
            from live.web import serve  # needs an extra
            serve(duplex, args.host, args.port, args.sessions, args.token, args.open, args.checkpoint)
        elif args.mic:
            from live.microphone import talk_to_microphone  # needs an extra
            talk_to_microphone(duplex, args.seed)
        elif args.say is not None:
            from evals.testsets import say
            wav, = say(duplex, [args.say], args.seed)
            write_audio(args.output, wav)
            print(f"Wrote {args.output} ({len(wav) / SAMPLE_RATE:.2f} s)")
        elif args.type is not None:
            typed = [duplex.vocab.wait] * 6 + typed_tokens(args.type, duplex.vocab, duplex.tokenizer)
            talk_to_file(duplex, None, len(typed) + after, args.output, args.stereo, args.picture, args.seed,
                         typed)
        else:
            talk_to_file(duplex, args.input, after, args.output, args.stereo, args.picture, args.seed)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
