"""ConversationState to it: one step of conversation, from 80 ms heard to 80 ms said (FLM-Audio, section 2), and the loop over a file.

    80 ms of audio --codec--> 8 codes heard --.
    text and codes it said in this frame -----+--> column t --model--> text and codes of column t+1
                                              '--- 8 codes said --codec--> 80 ms of audio

The model listens while it speaks: every frame goes both ways. An answer to what was heard up to the end of frame t can be
played in frame t+1 at the earliest, and that is where it stands in the reply.

    python chat.py --checkpoint out/tiny --input user.wav --output reply.wav [--stereo] [--picture reply.png]
    python chat.py --checkpoint out/tiny --web       in the browser
    python chat.py --checkpoint out/tiny --mic       in the terminal

B conversations in a batch, K codebooks.
"""
import argparse
import json
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE, read_audio, write_audio
from files.tokenizer import load_tokenizer
from kernels.sampling import Sampling, sample
from live.graph import capture
from live.transcript import Lines, Transcript
from mimi import FRAME, Mimi, tensors
from model import FLM, KVCache
from streams import DELAYED, FRAME_RATE, K, LISTEN, ROWS, SPEAK, TEXT

RECENT = 32  # text tokens that the repetition penalty looks back on


# ---------------------------------------------------------------------------------------------------------------------
# one step of conversation


@dataclass
class ConversationState:
    """The memory of B conversations between one frame and the next. A step changes it in place."""
    cache: KVCache  # of the temporal transformer
    codec: dict
    text: torch.Tensor  # (B,) the text token of the next column
    speak: torch.Tensor  # (B, K) its speak codes
    heard: torch.Tensor  # (B, K) codes of the last frame heard; the delayed ones have still to enter the grid
    recent: torch.Tensor  # (B, RECENT) the last text tokens
    seed: torch.Tensor  # (B,) of the random numbers
    failed: torch.Tensor  # (B,) whether logits have not been finite

    def small_tensors(self):
        """All but the rings of keys and values. To put these back undoes a step: with its position put back, a row's next
        step overwrites what the undone one wrote to the rings, and nothing reads it before."""
        return [*tensors({**vars(self), "cache": self.cache.position})]


class DuplexModel:
    """A model with its codec and tokeniser, and how it samples text and audio: all that a conversation needs."""

    def __init__(self, model, vocab, codec, tokenizer, text=Sampling(), audio=Sampling()):
        self.device = model.head.weight.device
        # On a GPU a step takes as long as reading the weights does, and in bfloat16 they are half as many bytes.
        self.model = model.bfloat16() if self.device.type == "cuda" else model
        self.vocab, self.codec, self.tokenizer, self.text, self.audio = vocab, codec, tokenizer, text, audio
        self.delayed = DELAYED.to(self.device)

    @staticmethod
    def load(folder, device="cpu", text=Sampling(), audio=Sampling()):
        """What train.py has left in a folder. Raises ValueError or OSError with the file's name."""
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder; --checkpoint is one that train.py wrote, such as out/tiny")
        model, vocab, _ = FLM.load(os.path.join(folder, "checkpoint.pt"), device)
        codec = Mimi.load(os.path.join(folder, "codec.pt"), device)
        return DuplexModel(model, vocab, codec, load_tokenizer(os.path.join(folder, "tokenizer.json")), text, audio)

    def init_state(self, seeds):
        """The state at the start of len(seeds) conversations."""
        B, v = len(seeds), self.vocab
        full = lambda value, *shape: torch.full((B, *shape), value, device=self.device)
        speak = torch.where(self.delayed, v.empty, torch.tensor(v.silence[-1], device=self.device)).repeat(B, 1)
        return ConversationState(self.model.init_cache(B), self.codec.init_state(B), full(v.wait), speak, full(v.empty, K),
                                 full(-1, RECENT), torch.tensor(list(seeds), device=self.device), full(False))

    @torch.inference_mode()
    def step(self, wav, state):
        """One frame both ways: (B, 1, 1920) heard -> text tokens (B,), (B, 1, 1920) said; the state moves on. Nothing here
        waits for the device, so that all of it can be captured as one CUDA graph."""
        codes = self.codec.encode_step(wav, state.codec)[..., 0]
        column = torch.empty(len(wav), ROWS, dtype=torch.long, device=self.device)
        column[:, TEXT], column[:, SPEAK] = state.text, state.speak
        column[:, LISTEN] = torch.where(self.delayed, state.heard, codes)
        text, speak = self.model.step(column, state.cache, lambda logits: self.sample_text(logits, state),
                                      lambda logits, k: self.sample_code(logits, k, state))
        said = torch.where(self.delayed, speak, state.speak)  # a whole frame: its delayed codes came only now
        for old, new in ((state.text, text), (state.speak, speak), (state.heard, codes)):
            old.copy_(new)
        return text, self.codec.decode_step(said[..., None], state.codec)

    def sample_text(self, logits, state):
        text = self.sample(logits[:, :self.vocab.text_size], self.text, state, 0, state.recent)
        written = text.masked_fill(text == self.vocab.wait, -1)
        state.recent.copy_(torch.cat([state.recent[:, 1:], written[:, None]], 1))
        return text

    def sample_code(self, logits, k, state):
        return self.sample(logits[:, :self.vocab.codebook_size], self.audio, state, 1 + k)  # never "empty"

    def sample(self, logits, sampling, state, draw, recent=None):
        token = sample(logits, sampling, state.seed, state.cache.position, draw, recent)
        state.failed |= token < 0
        return token.clamp(min=0)

    def compiled_step(self, state):
        """`step` as a function of the audio alone; on a GPU one CUDA graph, whose results the next call overwrites."""
        step = lambda wav: self.step(wav, state)
        if self.device.type != "cuda":
            return step
        return capture(step, torch.zeros(len(state.seed), 1, FRAME, device=self.device), state.small_tensors())

    def converse(self, wav, seed=1, each=lambda t, text: None):
        """Whole conversations, frame by frame: (B, N) heard -> text tokens (B, T) and audio said (B, N), on one clock.
        each(t, text (B,)) is called after every frame. The b-th conversation's seed is seed + b. ValueError if the model's
        logits are not numbers."""
        B, N = wav.shape
        wav = F.pad(wav, (0, -N % FRAME)).to(self.device)[:, None]
        state, texts, audio = self.init_state(range(seed, seed + B)), [], [wav.new_zeros(B, 1, FRAME)]
        step = self.compiled_step(state)
        for t, frame in enumerate(wav.split(FRAME, -1)):
            text, said = step(frame)
            each(t, text)
            texts.append(text.clone())
            audio.append(said.clone())
        if state.failed.any():
            raise ValueError("the model's logits are not numbers; its weights are damaged")
        return torch.stack(texts, 1).cpu(), torch.cat(audio, -1)[:, 0, :N].cpu()


# ---------------------------------------------------------------------------------------------------------------------
# a conversation with a file


def talk_to_file(duplex, source, target, stereo, picture, seed):
    heard = read_audio(source)
    transcript = Transcript(duplex)
    lines = Lines(transcript)
    begin = time.perf_counter()
    _, said = duplex.converse(heard[None], seed, lambda t, text: lines.add(t, text.item()))
    seconds = time.perf_counter() - begin
    print()
    write_audio(target, torch.stack([heard, said[0]]) if stereo else said[0])
    notes = os.path.splitext(target)[0] + ".jsonl"
    with replace_when_done(notes) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(piece, ensure_ascii=False) + "\n" for piece in transcript.pieces)
    frames = -(-len(heard) // FRAME)
    where = f"{torch.get_num_threads()} thread(s)" if duplex.device.type == "cpu" else duplex.device.type
    print(f"{frames} frames at {frames / seconds:.0f} a second: {frames / seconds / FRAME_RATE:.1f} times real time on {where}")
    if picture:
        from evals.plot import draw_talk  # needs an extra
        draw_talk(picture, heard, said[0], transcript.pieces)
    print(f"Wrote {target} ({len(heard) / SAMPLE_RATE:.2f} s{', left heard, right said' if stereo else ''}) and {notes}"
          + (f" and {picture}" if picture else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/tiny", help="folder that train.py wrote")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--input", help="any audio file: what the user says")
    way.add_argument("--web", action="store_true", help="serve a page to talk on")
    way.add_argument("--mic", action="store_true", help="microphone and loudspeaker of this machine")
    parser.add_argument("--output", default="reply.wav")
    parser.add_argument("--stereo", action="store_true", help="write both voices: left the user, right the model")
    parser.add_argument("--picture", help="draw the conversation into this file (.png, .svg)")
    parser.add_argument("--host", default="127.0.0.1", help="of --web; any other than this machine itself needs a token")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", help="that the page's address must carry; drawn anew if --host needs one")
    parser.add_argument("--sessions", type=int, default=4, help="conversations at once in --web")
    parser.add_argument("--temperature", type=float, default=0.0, help="of text and audio; 0: always the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that sum to p")
    parser.add_argument("--penalty", type=float, default=1.0, help=f"against repeating one of the last {RECENT} text tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        audio = Sampling(args.temperature, args.top_k, args.top_p)
        text = Sampling(args.temperature, args.top_k, args.top_p, args.penalty)
        duplex = DuplexModel.load(args.checkpoint, args.device, text, audio)
        if args.web:
            from live.web import serve  # needs an extra
            serve(duplex, args.host, args.port, args.sessions, args.token)
        elif args.mic:
            from live.microphone import talk_to_microphone
            talk_to_microphone(duplex, args.seed)
        else:
            talk_to_file(duplex, args.input, args.output, args.stereo, args.picture, args.seed)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
