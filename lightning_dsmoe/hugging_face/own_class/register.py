"""Making the own class known to transformers in this process."""

# mypy: disable-error-code="no-untyped-call"


def register_own_class() -> None:
    """Let the Auto classes of transformers load exported directories with the code installed here.

    Then `AutoModelForCausalLM.from_pretrained(directory)` runs no code from the directory and needs
    no `trust_remote_code`. Models made this way bring the code along when they are saved again.

    Raises:
        ImportError: if transformers is not installed.

    Examples:
        >>> from lightning_dsmoe.hugging_face.own_class import register_own_class
        >>> register_own_class()  # doctest: +SKIP
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            "the own class needs transformers: pip install 'lightning-dsmoe[hf]'"
        ) from error
    from lightning_dsmoe.hugging_face.own_class.configuration_dsmoe import DSMoEConfig
    from lightning_dsmoe.hugging_face.own_class.modeling_dsmoe import DSMoEForCausalLM, DSMoEModel

    AutoConfig.register(DSMoEConfig.model_type, DSMoEConfig, exist_ok=True)
    AutoModel.register(DSMoEConfig, DSMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(DSMoEConfig, DSMoEForCausalLM, exist_ok=True)
    DSMoEConfig.register_for_auto_class()
    DSMoEModel.register_for_auto_class("AutoModel")
    DSMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
