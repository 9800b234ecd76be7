"""Where Trimtab lives in PEFT: the config, the layers, the sites of a model that can be adapted."""
