"""Returns token ids of captions from the tokenizers of other projects.

usage: captions.py clip|bert REQUEST.json REPLY.json PATH
request: {"texts": [...], "length": n}; reply: [[id, ...], ...]
clip: SimpleTokenizer of open_clip; the path of its vocabulary is added to the reply as the last item, and the
      vocabulary is written into the folder PATH as vocab.json and merges.txt
bert: BertTokenizerFast of transformers with the vocab.txt PATH, uncased, without [CLS] and [SEP]
"""
import json
import sys

which, request, reply = sys.argv[1:4]
options = json.load(open(request))
if which == "clip":
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    tokenizer = SimpleTokenizer(context_length=options["length"])
    ids = tokenizer(options["texts"]).tolist() + [default_bpe()]
    json.dump(tokenizer.encoder, open(f"{sys.argv[4]}/vocab.json", "w"))
    ranks = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    with open(f"{sys.argv[4]}/merges.txt", "w") as file:
        file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ranks))
else:
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast(vocab_file=sys.argv[4], do_lower_case=True)
    ids = [
        tokenizer(text, add_special_tokens=False, truncation=True, max_length=options["length"],
                  padding="max_length")["input_ids"]
        for text in options["texts"]
    ]
json.dump(ids, open(reply, "w"))
