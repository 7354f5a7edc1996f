"""What others call the fields of a recipe, balancing methods, and the options of ``engine.train``.

Names of transformers' and sentence-transformers' arguments, of BERT's configuration files, of
accelerate, MT-DNN, LibMTL, TorchJD, CS224N's default project and of torch.  Those that
:func:`.messages.close` understands by their words are left out.
"""

from collections.abc import Mapping
from types import MappingProxyType

from .renamed import RENAMED

_FIELDS = {
    "average_best": "average_checkpoints checkpoint_averaging model_soup swa average_top_k",
    "balance": "balancing_method grad_method gradient_surgery mtl_method weighting aggregator "
    "pcgrad use_pcgrad",
    "batch_size": "bs bsz micro_batch_size train_bs",
    "betas": "adam_beta1 adam_beta2",
    "checkpoint_every": "save_every save_steps save_interval save_per_updates",
    "checkpoint_layers": "grad_checkpoint gradient_checkpointing activation_checkpointing",
    "clip_norm": "clip_grad clip_grad_norm global_grad_clipping grad_clip grad_clipping "
    "gradient_clip_val gradient_clipping grad_norm max_grad_norm max_norm norm",
    "data": "dataset_path",
    "dropout": "classifier_dropout head_dropout",
    "best_of": "metric_for_best_model monitor",
    "eps": "adam_epsilon epsilon optimizer_eps adam_eps",
    "eval_every": "eval_interval eval_steps evaluation_steps val_check_interval",
    "execution": "compile jit_compile torch_compile use_compile dynamo_backend "
    "torch_compile_backend torch_compile_mode",
    "freeze_encoder": "freeze_bert freeze_backbone freeze_base_model fine_tune_mode option "
    "freeze_layers num_frozen_layers",
    "init": "bert_model init_checkpoint model_name model_name_or_path pretrained "
    "pretrained_model pretrained_model_name_or_path load_path model_path model_ckpt",
    "keep_checkpoints": "save_total_limit",
    "layer_lr_decay": "layerwise_lr_decay llrd",
    "log_every": "log_interval log_per_updates log_steps logging_steps",
    "log_layer_cosines_every": "watch_layer",
    "loggers": "report_to sink tensorboard wandb log_with",
    "lora_alpha": "peft_alpha",
    "lora_targets": "lora_target_modules peft_target_modules target_modules",
    "lora_rank": "lora peft_r use_lora use_peft",
    "lr": "learning_rate lrate",
    "max_length": "max_seq_len max_seq_length max_sequence_length model_max_length seq_len "
    "sequence_length block_size",
    "max_steps": "num_iterations train_iters",
    "max_train_examples": "max_samples train_size",
    "micro_batches": "accumulate_grad_batches grad_accum_steps grad_accumulation_step "
    "gradient_accumulation gradient_accumulation_steps mini_batch_size accumulation_steps "
    "grad_acc accum accumulate accumulate_grad",
    "optimizer": "optim optim_type optimizer_type",
    "patience": "early_stopping early_stopping_patience early_stop",
    "pooling": "pooling_strategy",
    "precision": "amp bf16 fp16 mixed_precision tf32 torch_dtype dtype fp32 half use_amp",
    "schedule": "learning_rate_schedule lr_schedule lr_scheduler lr_scheduler_type "
    "scheduler_type warmup_schedule cosine_schedule",
    "seed": "manual_seed random_seed random_state",
    "warmup": "lr_warmup lr_warmup_steps num_warmup_steps warmup_steps",
    "weight_decay": "adam_weight_decay decay l2 wd",
    "encoder.hidden_size": "d_model dim emb_size embed_dim hidden_dim n_embd width",
    "encoder.intermediate_size": "d_ff dim_feedforward ffn_dim ffn_size",
    "encoder.max_position_embeddings": "max_positions n_positions",
    "encoder.num_attention_heads": "head_size heads n_head nhead",
    "encoder.num_hidden_layers": "depth",
    "encoder.attention_probs_dropout_prob": "attn_dropout attention_dropout_prob",
    "encoder.initializer_range": "init_std",
    "objectives.NAME.mask_share": "mask_prob masking_ratio masked_lm_prob mlm_probability",
    "objectives.NAME.temperature": "simcse_temperature tau temp",
    "objectives.NAME.tokens_per_batch": "max_tokens tokens_per_step",
    "objectives.NAME.whole_words": "wwm whole_word_mask whole_word_masking",
    "objectives.NAME.max_per_source": "objectives.NAME.first objectives.NAME.first_n",
    "tasks.NAME.first_n": "first tasks.NAME.limit tasks.NAME.max_samples tasks.NAME.source.limit",
    "tasks.NAME.class_weights": "pos_weight",
    "tasks.NAME.focal_gamma": "focal_loss",
    "tasks.NAME.threshold": "cutoff decision_threshold",
    "tasks.NAME.label_smoothing": "label_smoothing_factor",
    "tasks.NAME.head": "feature features tasks.NAME.feature tasks.NAME.head_type",
    "tasks.NAME.weight": "loss_weight loss_weights task_weight task_weights",
    "tasks.NAME.metrics": "compute_metrics",
    "tasks.NAME.tag_pieces": "label_all_tokens label_subword",
    "tasks.NAME.margin": "triplet_margin",
    "tasks.NAME.symmetric": "symmetric_loss bidirectional",
    "tasks.NAME.source.files": "data_files train_file train_path train_data validation_file "
    "test_file dev_file",
    "tasks.NAME.source.classes": "num_labels label_names label_list",
    "tasks.NAME.source.max_answer_tokens": "max_answer_length max_answer_len",
    "tasks.NAME.source.shuffle_buffer": "buffer_size shuffle_size",
    "tasks.NAME.source.streaming": "streamed stream iterable_dataset",
    "tasks.NAME.source.split_by_rank": "split_dataset_by_node shard_by_rank shard_data",
    "tasks.NAME.source.unanswerable": "version_2_with_negative squad_v2 allow_no_answer",
    "tasks.NAME.source.window_overlap": "doc_stride document_stride window_stride",
    "distribute": "fsdp deepspeed zero_stage ddp world_size local_rank",
    "head_lr": "classifier_lr lr_head",
    "optimizer_options": "optim_args optimizer_kwargs",
    "sampling_alpha": "sampling_temperature multinomial_alpha",
    "task_schedule": "batch_sampler multi_dataset_batch_sampler mix_opt",
    "timeout": "ddp_timeout",
    "train": "train_datasets",
    "encoder.hidden_dropout_prob": "bert_dropout_p bert_dropout",
    "tasks.NAME.source.label": "label_column",
    "tasks.NAME.source.text": "text_column sentence1 sentence1_key",
    "tasks.NAME.source.subset": "dataset_config_name dataset_config",
    "balancing.cagrad_c": "calpha",
    "--out": "out out_dir output output_dir output_folder save_dir save_path project_dir",
    "--device": "device use_cpu no_cuda use_gpu gpu cuda cpu gpu_id",
    "--resume": "resume resume_from_checkpoint",
    "--seeds": "seeds num_seeds",
}

_METHODS = {
    "db_mtl": "dual_balancing",
    "dual_projection": "dualproj gem",
    "dwa": "dynamic_weight_average dynamic_weight_averaging",
    "gls": "geometric geometric_loss geometric_loss_strategy geometric_mean geometricmean",
    "rlw": "random random_loss_weighting random_weighting",
    "stch": "smooth_tchebycheff tchebycheff",
    "sum": "equal_weighting ew linear_scalarization",
    "uw": "kendall uncert uncertainty uncertainty_weighting uncertainty_weights",
}
"""What papers, LibMTL and TorchJD call the methods of ``balance``."""

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        name.lower(): field
        for table in (_FIELDS, _METHODS)
        for field, names in table.items()
        for name in names.split()
    }
    | {name.lower(): field for name, field in RENAMED.items()}
)
"""The field, option or method that each name stands for; names within a table are dotted.

Old names are among them, for where they are written otherwise or stand in another table."""

OPTIONS = tuple(field for field in _FIELDS if field.startswith("--"))
"""The options among them."""
