"""Counts of hits and of errors: proportions with their intervals, error rates."""
from collections import Counter

from evals.turns import format_proportion, wilson


def edit_distance(found, right):
    """Substitutions, deletions and insertions that separate two sequences (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


class Proportions:
    """Named counts of hits, printed as proportions with their 95% intervals, and of errors."""

    def __init__(self):
        self.hits, self.n, self.errors = Counter(), Counter(), Counter()

    def add(self, name, hit, of=1):
        self.hits[name] += hit
        self.n[name] += of

    def add_errors(self, name, found, right):
        """Words or letters that were found, and the right ones."""
        errors = edit_distance(found, right)
        self.errors[name] += errors
        self.add(name, max(0, len(right) - errors), len(right))

    def proportion(self, name):
        return self.hits[name] / max(1, self.n[name])

    def error_rate(self, name):
        return self.errors[name] / max(1, self.n[name])

    def line(self, name):
        line = format_proportion(self.proportion(name), *wilson(self.hits[name], self.n[name]), self.n[name])
        if name not in self.errors:
            return line
        return f"{line}   {'CER' if 'CER' in name else 'WER'} {self.error_rate(name):.3f}"
