"""The Fisher information of a program: families → evidence → blocks → memory → solve."""
