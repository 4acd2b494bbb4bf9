"""Owns what a study's report says whatever was measured: how to read its figures. Knows no numbers."""

from typing import Final

SEARCHED: Final = (
    "The learning rate of a method is the one with the lowest held-out loss in short trials, in which test "
    "rows had no part."
)
SURE: Final = (
    "Brackets hold intervals of 95 %. A difference is called sure if they do not overlap. That is strict: "
    "a comparison row by row (quickchange evaluate --against) can be sure of smaller ones."
)
ONE_RUN: Final = "Times and memory are of one run each, so their noise is not known."
SEEDS: Final = (
    "After ± stands the standard deviation over seeds; intervals are of both the choice of test rows and the "
    "seeds."
)
ENGINES: Final = (
    "Answered by: server is the engine that serves; reference is transformers with PEFT, where no server "
    "applies what the method leaves."
)
COSTS: Final = (
    "Training time is of all optimizer steps, without loading and saving. Peak memory is of the training "
    "process, added memory is by how much training raised it, and predicted is what that was to be."
)
RELATIVE: Final = (
    "Time, memory and size as multiples; quality as differences, of rates in points of 100; “?” stands where "
    "the difference is not sure."
)
PREDICTED: Final = (
    "What training would add to memory was predicted before its first step. The error is predicted over "
    "measured, less 1: above nought too much was predicted."
)
EDGE: Final = "Taken from the edge of what was tried, so that a rate beyond it may be better:"
