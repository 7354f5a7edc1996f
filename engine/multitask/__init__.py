"""The multitask step: flat parameters and gradient rows, surgery, update."""
