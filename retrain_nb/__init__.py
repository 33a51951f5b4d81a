"A notebook-first, reproducible continuous-retraining workbench"

__version__ = "0.1.0"
