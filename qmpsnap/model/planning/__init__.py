"""The pure rules that plans follow: who needs which layer, what merges into what, what may go."""
