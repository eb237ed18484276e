"""The recipe behind zoo/qwen2vl-nano: pictures, questions, training, evaluation."""
