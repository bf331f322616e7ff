"""What happens while a batch passes through a pruned model.

Four things are known of a site, each in one place. Where it lies in the model is a ``SiteBinding``, which never
changes; what is known from calibration and earlier batches is its ``SiteState`` (:mod:`.site_state`). The units that
it computes with now, and the weights cut to them, are an ``OpenCut`` (:mod:`.open_cut`). A ``SiteCut`` holds these
three (:mod:`.site_cut`). What holds for one batch alone is a ``Batch``, with a ``SiteBatch`` for every site, in
:mod:`.batch`: it is made when the decoder is called, and dropped when the call ends. Other threads and copies of the
model have batches of their own.

One batch of a strategy that decides per batch:

1.  The decoder is called. ``DecoderForward`` makes the ``Batch``: its shape, its real tokens (:mod:`.calls`).
2.  A layer begins. The batch notes the layer's key/value cache; decode steps reuse the decisions stored with the
    cache, and leave out steps 4 to 6 and 10 (:mod:`.decode_cache`). A step like the one before leaves out all of them
    (:mod:`.steady`).
3.  The site's norm reads the residual stream, which the batch keeps until the block is entered (:mod:`.hooks`).
4.  Select: the strategy's selector picks the probe's rows and positions (:mod:`.probing`).
5.  Probe: the block's own forward runs on them with all units, and what reaches its consumer is kept. The probe's
    statistic and mean are computed from that (:mod:`.probing`).
6.  Score: the merger combines the statistic with history, the scorer scores the units, the highest are kept
    (:mod:`.decider`).
7.  The site opens an ``OpenCut`` to these units, and its modules take the sizes of the smaller site (:mod:`.site_cut`,
    :mod:`.open_cut`).
8.  Each producer (q/k/v, gate/up) gets its weight from the mask applier, and computes with it in one of three ways: in
    a fused product, with the probe's products reused, or with a copy (:mod:`.linears`, :mod:`.gathering`).
9.  The block computes its smaller attention or MLP: the model's own code.
10. Observe: the input of the consumer (o_proj, down_proj) is observed, and the updated history waits with the batch
    (:mod:`.learning`).
11. The consumer computes with its cut weight, compensation included (:mod:`.compensation`). The cut closes when the
    next site is entered or the batch ends, unless a key/value cache needs it.
12. Commit: the decoder has returned; if what was decided and observed is finite, histories are written
    (:mod:`.learning`). A batch that fails changes no history.

Where units are decided once, cuts stay open, and a site takes only steps 8, 9 and 11; if the compensation uses a
probe, steps 3 to 5 too. Around this: :mod:`.engine` installs all of it on a model and removes it; :mod:`.ahead`
decides for a site while the one before it runs; :mod:`.checkpointing` repeats decisions in a backward pass;
:mod:`.compiling` compiles the decoder; :mod:`.grouping` decides for groups of rows, which compute one after the other
in the linear layers of one block (:mod:`.grouped_cut`); :mod:`.kv_index` is attention for unevenly cut query heads;
:mod:`.per_unit` cuts tensors and arguments that have entries of units, :mod:`.config_view` sizes in a configuration;
:mod:`.generation` refuses ways to generate that cannot be right; :mod:`.policies` prunes prompts or steps alone, and
decides again in steps; :mod:`.rotary` puts rotary frequencies back; :mod:`.runtime` holds the options of all this, and
announces the steps of a decision.
"""
