"""Talk to it: sound in, sound out, 80 ms at a time, exactly as a live conversation would be.

    python chat.py --checkpoint out/tiny --input user.wav --output reply.wav [--stereo] [--picture reply.png]
    python chat.py --checkpoint out/tiny --web       in the browser (web.py)
    python chat.py --checkpoint out/tiny --mic       in the terminal (live.py)

engine.py holds the conversation. What is said about the first frame heard can be played in the second at the earliest, and that
is where it stands in the reply.
"""
import argparse
import json
import os
import sys
import time

import torch

from engine import RECENT, Speaker
from kernels.sampling import Sampling
from live import Lines, Transcript, talk_to_microphone
from files import SAMPLE_RATE, read_audio, replace_when_done, write_audio
from mimi import FRAME
from streams import FRAME_RATE


def talk_to_file(speaker, source, target, stereo, picture, seed):
    heard = read_audio(source)
    transcript = Transcript(speaker)
    lines = Lines(transcript)
    begin = time.perf_counter()
    _, said = speaker.converse(heard[None], seed, lambda t, text: lines.add(t, text.item()))
    seconds = time.perf_counter() - begin
    print()
    write_audio(target, torch.stack([heard, said[0]]) if stereo else said[0])
    notes = os.path.splitext(target)[0] + ".jsonl"
    with replace_when_done(notes) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(piece, ensure_ascii=False) + "\n" for piece in transcript.pieces)
    frames = -(-len(heard) // FRAME)
    where = f"{torch.get_num_threads()} thread(s)" if speaker.device.type == "cpu" else speaker.device.type
    print(f"{frames} frames at {frames / seconds:.0f} a second: {frames / seconds / FRAME_RATE:.1f} times real time on {where}")
    if picture:
        from plot import draw_talk  # needs an extra
        draw_talk(picture, heard, said[0], transcript.pieces)
    print(f"Wrote {target} ({len(heard) / SAMPLE_RATE:.2f} s{', left heard, right said' if stereo else ''}) and {notes}"
          + (f" and {picture}" if picture else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/tiny", help="folder that train.py wrote")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--input", help="any sound file: what the user says")
    way.add_argument("--web", action="store_true", help="serve a page to talk on")
    way.add_argument("--mic", action="store_true", help="microphone and loudspeaker of this machine")
    parser.add_argument("--output", default="reply.wav")
    parser.add_argument("--stereo", action="store_true", help="write both voices: left the user, right the model")
    parser.add_argument("--picture", help="draw the conversation into this file (.png, .svg)")
    parser.add_argument("--host", default="127.0.0.1", help="of --web; any other than this machine itself needs a token")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", help="that the page's address must carry; drawn anew if --host needs one")
    parser.add_argument("--sessions", type=int, default=4, help="conversations at once in --web")
    parser.add_argument("--temperature", type=float, default=0.0, help="of text and sound; 0: always the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that sum to p")
    parser.add_argument("--penalty", type=float, default=1.0, help=f"against repeating one of the last {RECENT} text tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        sound = Sampling(args.temperature, args.top_k, args.top_p)
        text = Sampling(args.temperature, args.top_k, args.top_p, args.penalty)
        speaker = Speaker.load(args.checkpoint, args.device, text, sound)
        if args.web:
            from web import serve  # needs an extra
            serve(speaker, args.host, args.port, args.sessions, args.token)
        elif args.mic:
            talk_to_microphone(speaker, args.seed)
        else:
            talk_to_file(speaker, args.input, args.output, args.stereo, args.picture, args.seed)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
