"""How good predicted geometry and video are: metrics by name, judged over clips and ranks. docs/evaluation.md defines them."""
