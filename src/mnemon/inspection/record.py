"""Record what a memory does while a model reads a text: one reading, all recorders side by side.

Which recorders watch depends on what the model holds, and a model may hold several (LM2 on a base with mixtures):

    memory banks            BankRecorder(model, tokenizer, reading, state)          .blocks() -> tuple[BankBlock, ...]
    linear memories         MixtureRecorder(model, tokenizer, reading, state)       .layers() -> tuple[MixtureLayer, ...]
    memory tokens           TokenMemoryRecorder(model, tokenizer, reading, state)   .memory() -> TokenMemory

Each is a `mnemon.inspection.reading.Recorder`; its method named above is called once, after the last segment, outside
of any watch, and may read parts of the text again (`reading.ids`, states it kept in `read`). `state` is what the model
had read before (None = nothing). `notes` says in words what was grouped or left out.

The parts that can be knocked out are lists of `mnemon.inspection.knock_out.Part`:

    bank_parts(model, ...)            in mnemon.inspection.knock_out
    mixture_parts(model)              in mnemon.inspection.record_mixture: memories of blocks, blocks, all
    token_memory_parts(model)         in mnemon.inspection.record_token_memory: memory tokens or blocks, all

Every list holds exactly one part of kind "all"; the model without it is what "without the memory" means.
"""
