"""Suggestions for an unknown name: a close one, or else where to look."""

import pytest

from engine.config import recipe as recipes
from engine.config.messages import FIELDS, close, names_of, nearest
from engine.config.other_names import OPTIONS, OTHER_NAMES
from engine.config.recipe import Recipe
from engine.config.tables import EncoderRecipe, TaskRecipe
from engine.gradients.balancing import METHODS, BalanceSettings
from engine.utils.errors import InputError

TYPOS = {
    **{"batchsize": "batch_size", "batch-size": "batch_size", "batch_sise": "batch_size"},
    **{"Batch_Size": "batch_size", "train_batch_size": "batch_size", "bs": "batch_size"},
    **{"epoch": "epochs", "num_epochs": "epochs", "epohcs": "epochs", "max_step": "max_steps"},
    **{"drop_out": "dropout", "dropuot": "dropout", "dropout_rate": "dropout"},
    **{"learning_rate": "lr", "lrate": "lr", "lrr": "lr", "LR": "lr", "wd": "weight_decay"},
    **{"weightdecay": "weight_decay", "decay": "weight_decay", "warmup_steps": "warmup"},
    **{"warmup_ratio": "warmup", "optim": "optimizer", "optimiser": "optimizer"},
    **{"freeze": "freeze_encoder", "precison": "precision", "clipnorm": "clip_norm"},
    **{
        "balance_granulrity": "balance_granularity",
        "micro_batch": "micro_batches",
        "random_seed": "seed",
    },
    **{"task": "tasks", "phase": "phases", "objective": "objectives", "logger": "loggers"},
}
UNRELATED = [
    "curriculum",
    *("gpu", "model", "workers", "nesterov", "temperature", "margin", "soft_prompt", "x", "k"),
    *("verbose", "max", "test", "name", "", "_", "__", "ä", "0"),
]


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_a_typical_slip_is_understood(typo, meant):
    assert close(typo, Recipe.model_fields) == [meant]


@pytest.mark.parametrize("word", UNRELATED)
def test_nothing_is_suggested_for_other_words(word):
    assert close(word, Recipe.model_fields) == []
    assert nearest(word, Recipe.model_fields, FIELDS) == f"; {FIELDS} shows all"


OF_OTHERS = {
    # transformers' TrainingArguments
    "output_dir": "--out",
    "overwrite_output_dir": "",
    "do_train": "",
    "eval_strategy": "",
    "eval_steps": "eval_every",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "",
    "per_gpu_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "micro_batches",
    "gradient_checkpointing": "checkpoint_layers",
    "learning_rate": "lr",
    "adam_beta1": "betas",
    "adam_epsilon": "eps",
    "max_grad_norm": "clip_norm",
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "logging_steps": "log_every",
    "logging_dir": "",
    "save_steps": "checkpoint_every",
    "save_strategy": "",
    "save_total_limit": "keep_checkpoints",
    "use_cpu": "--device",
    "data_seed": "",
    "bf16": "precision",
    "fp16": "precision",
    "dataloader_num_workers": "",
    "run_name": "",
    "load_best_model_at_end": "",
    "label_smoothing_factor": "tasks.NAME.label_smoothing",
    "optim": "optimizer",
    "report_to": "loggers",
    "torch_compile": "execution",
    "resume_from_checkpoint": "--resume",
    "max_train_samples": "max_train_examples",
    "model_name_or_path": "init",
    "mlm_probability": "objectives.NAME.mask_share",
    # sentence-transformers
    "train_batch_size": "batch_size",
    "eval_batch_size": "",
    "steps_per_epoch": "",
    "scheduler": "schedule",
    "evaluator": "",
    "evaluation_steps": "eval_every",
    "optimizer_class": "",
    "use_amp": "precision",
    "max_seq_length": "max_length",
    "pooling_mode": "pooling",
    "num_labels": "tasks.NAME.source.classes",
    "doc_stride": "tasks.NAME.source.window_overlap",
    "max_answer_length": "tasks.NAME.source.max_answer_tokens",
    "version_2_with_negative": "tasks.NAME.source.unanswerable",
    "buffer_size": "tasks.NAME.source.shuffle_buffer",
    "shuffle_buffer_size": "tasks.NAME.source.shuffle_buffer",
    "split_dataset_by_node": "tasks.NAME.source.split_by_rank",
    "similarity_fct": "",
    "pos_weight": "tasks.NAME.class_weights",
    "decision_threshold": "tasks.NAME.threshold",
    # MT-DNN, and the projects of CS224N
    "init_checkpoint": "init",
    "data_dir": "data",
    "grad_clipping": "clip_norm",
    "global_grad_clipping": "clip_norm",
    "grad_accumulation_step": "micro_batches",
    "log_per_updates": "log_every",
    "max_seq_len": "max_length",
    "batch_size_eval": "",
    "dropout_p": "dropout",
    "lr_gamma": "",
    "cuda": "--device",
    "option": "freeze_encoder",
    "fine_tune_mode": "freeze_encoder",
    "train_datasets": "train",
    "save_per_updates": "checkpoint_every",
    "adam_eps": "eps",
    "label_names": "tasks.NAME.source.classes",
    "hidden_dropout": "encoder.hidden_dropout_prob",
    # BERT's configuration and its relatives'
    "hidden_size": "encoder.hidden_size",
    "num_hidden_layers": "encoder.num_hidden_layers",
    "num_attention_heads": "encoder.num_attention_heads",
    "intermediate_size": "encoder.intermediate_size",
    "attention_dropout": "encoder.attention_probs_dropout_prob",
    "classifier_dropout": "dropout",
    "hidden_act": "",
    "type_vocab_size": "",
    "layer_norm_eps": "",
    "pad_token_id": "",
    "position_embedding_type": "",
    "n_layer": "encoder.num_hidden_layers",
    "n_head": "encoder.num_attention_heads",
    "n_embd": "encoder.hidden_size",
    "d_model": "encoder.hidden_size",
    # Lightning, torch and words of every day
    "heads": "encoder.num_attention_heads",
    "layers": "encoder.num_hidden_layers",
    "num_layers": "encoder.num_hidden_layers",
    "max_epochs": "epochs",
    "gradient_clip_val": "clip_norm",
    "accumulate_grad_batches": "micro_batches",
    "log_every_n_steps": "",
    "devices": "",
    "seeds": "--seeds",
    "train_steps": "max_steps",
    "weight": "objectives.NAME.weight or tasks.NAME.weight",
    "alpha": "lora_alpha or sampling_alpha",
    "head_size": "encoder.num_attention_heads",
    # accelerate, LibMTL, TorchJD
    "mixed_precision": "precision",
    "log_with": "loggers",
    "project_dir": "--out",
    "dynamo_backend": "execution",
    "weighting": "balance",
    "aggregator": "balance",
    "calpha": "balancing.cagrad_c",
    "gpu_id": "--device",
    "train_bs": "batch_size",
    "local_rank": "distribute",
    "accumulation_steps": "micro_batches",
    "pcgrad": "balance",
    # PEFT
    "lora_r": "lora_rank",
    "target_modules": "lora_targets",
    "use_lora": "lora_rank",
    "modules_to_save": "",
    "layerwise_lr_decay": "layer_lr_decay",
    "encoder_lr": "",
    "early_stopping_patience": "patience",
    "swa": "average_best",
    "model_soup": "average_best",
    "average_checkpoints": "average_best",
    # within a table
    "balancing.lr": "famo_lr or gradnorm_lr or imtl_lr or uw_lr",
    "balancing.temperature": "dwa_temperature",
    "balancing.mu": "stch_mu",
    "balancing.gamma": "famo_gamma",
    "balancing.warmup": "stch_warmup",
    "balancing.alpha": "fairgrad_alpha or gradnorm_alpha",
    "balancing.max_norm": "nash_mtl_max_norm",
    "encoder.heads": "num_attention_heads",
    "encoder.layers": "num_hidden_layers",
    "encoder.d_model": "hidden_size",
    "encoder.batch_size": "batch_size or objectives.NAME.batch_size or tasks.NAME.batch_size",
    "tasks.sst.limit": "first_n",
    "tasks.sst.source.limit": "tasks.NAME.first_n",
    "tasks.sst.lr": "lr",
    "tasks.sst.loss_weight": "weight",
    "objectives.text.first": "max_per_source",
    "objectives.text.mlm_probability": "mask_share",
    "phases.one.learning_rate": "lr",
    "phases.one.num_epochs": "epochs",
    "phases.one.heads": "",
}


@pytest.mark.parametrize(("name", "offered"), OF_OTHERS.items())
def test_names_of_other_trainers(name, offered):
    """What is offered is what a person would accept who uses the name there; or nothing is."""
    with pytest.raises(InputError) as error:
        recipes.load("cgs", ["objectives.text.kind=simcse", f"{name}=1"])
    found = str(error.value).partition("did you mean ")[2].partition("?")[0]
    assert found == offered, str(error.value)


def test_every_other_name_is_needed_and_stands_for_something(monkeypatch):
    """The table of other names has what the words alone do not find."""
    fields = [*names_of(Recipe), *OPTIONS]
    known = {meant: fields if meant in fields else METHODS for meant in OTHER_NAMES.values()}
    for name, meant in OTHER_NAMES.items():
        assert close(name, known[meant]) == [meant]
    monkeypatch.setattr("engine.config.messages.OTHER_NAMES", {})
    found = {name: close(name, known[meant]) for name, meant in OTHER_NAMES.items()}
    assert [name for name, meant in OTHER_NAMES.items() if found[name] == [meant]] == []


def test_several_that_are_as_close_are_all_named():
    assert close("checkpoint", Recipe.model_fields) == ["checkpoint_every", "checkpoint_layers"]
    assert nearest("krum", ["krum_a", "krum_b"]) == "; did you mean krum_a or krum_b?"


def test_every_name_is_close_to_itself():
    for known in (Recipe, TaskRecipe, EncoderRecipe, BalanceSettings):
        for name in known.model_fields:
            assert close(name, known.model_fields) == [name]
    for name in (*METHODS, *recipes.names()):
        assert close(name, METHODS if name in METHODS else recipes.names()) == [name]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *(("pcgard", "pcgrad"), ("gradvec", "gradvac"), ("nash", "nash_mtl")),
        *(("IMTL", "imtl"), ("imtll", "imtl_l"), ("DB_MTL", "db_mtl"), ("dbmtl", "db_mtl")),
        *(("uncertainty", "uw"), ("Random", "rlw"), ("GeometricMean", "gls"), ("EW", "sum")),
        *(("dynamic_weight_average", "dwa"), ("smooth_tchebycheff", "stch")),
    ],
)
def test_methods(word, meant):
    assert close(word, METHODS) == [meant]


@pytest.mark.parametrize("word", ["graddrop", "uniform", "moco", "sdmgrad", "excess", "adam"])
def test_words_that_are_like_no_method(word):
    assert close(word, METHODS) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nesterov=3", f"unknown key nesterov; {FIELDS} shows all"),
        ("best_of=stss", "best_of = 'stss': no such score; did you mean sts?"),
        ("best_of=f1", "best_of = 'f1': no such score; known: overall, sst, quora, sts"),
        ("phases.one.best_of=sts", "phases.one: no setting of a phase: best_of"),
        ("soft_prompt=3", f"unknown key soft_prompt; {FIELDS} shows all"),
        ("batchsize=3", f"unknown key batchsize; did you mean batch_size?; {FIELDS} shows all"),
        ("tasks.sst.feature=single", "unknown key tasks.sst.feature; did you mean head?"),
        ("tasks.sst.pool=cls", f"unknown key tasks.sst.pool; {FIELDS} shows all"),
        ("tasks.sst.class_weights=[1,0]", "class_weights = [1, 0]: expected a list of positive"),
        ("tasks.sst.class_weights=even", "= 'even': expected a list of positive numbers, one for"),
        ("tasks.sst.label_smoothing=1", "label_smoothing = 1: Input should be less than 1"),
        ("tasks.sst.source.kid=1", "tasks.sst.source"),
        ("encoder.layers=2", "did you mean num_hidden_layers?"),
        (
            "encoder.dropout=0",
            "did you mean attention_probs_dropout_prob or hidden_dropout_prob?",
        ),
        ("tasks.sst.source.seperator=1", f"unknown key tasks.sst.source.seperator; {FIELDS} shows"),
        ("tasks.sst.source.label=y", "tasks.sst.source.kind: missing; give it a value"),
        ("train=sst", "train = 'sst': expected a list, such as [\"sst\"]"),
        ("train=3", "train = 3: expected a list"),
        ("loggers=wandb", 'expected a list, such as ["wandb"]'),
        ("hidden_size=64", "unknown key hidden_size; did you mean encoder.hidden_size?"),
        ("cagrad_c=0.1", "did you mean balancing.cagrad_c?"),
        ("features=cosine", "did you mean tasks.NAME.head?"),
        ("balancing.cagrad_d=0.1", "did you mean cagrad_c?"),
        ("balance=foo", f"no such method; {FIELDS} shows all"),
        ("phases.one.soft_prompt=1", f"no setting of a phase: soft_prompt; {FIELDS} shows all"),
        ("train=['stsb']", "did you mean sts?"),
        ("train=['mood']", "known: sst, quora, sts"),
    ],
)
def test_the_line_names_what_is_close_or_the_page(override, expected):
    with pytest.raises(InputError) as error:
        recipes.load("cgs", [override])
    assert expected in str(error.value)
    assert len(str(error.value)) < 200


def test_recipes():
    for name, expected in {
        "cgz": "did you mean cgs?",
        "foo": "not found; --list shows all",
    }.items():
        with pytest.raises(InputError) as error:
            recipes.load(name)
        assert expected in str(error.value)
