"""Speech that exists already: corpora as they are downloaded, dialogues as text, what a microphone adds."""
