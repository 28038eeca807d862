"""Layouts of other papers in the same grid, each a few lines: change one thing.

A layout is a function f(turns, gaps, data, rng) -> an undelayed grid (17, T), which a stage of training names
as "file:function" (train.Stage.layouts, questions/layouts.py).

    turns   [(user, model), ...], streams.Utterance each
    gaps    silent frames before each turn, which may be used as they are
    data    train.Conversations: .vocab, .tokenizer, and .line and .utterance for anything else in the data
    rng     random.Random; the same state gives the same grid

streams.py has what grids are built with (blank, put, dialogue). What is read but not learned from is written
through streams.given; a grid that begins with such a column begins with a prompt, which is never cut off.
"""
