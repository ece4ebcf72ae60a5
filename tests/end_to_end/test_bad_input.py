"""A hundred bad inputs to all commands: status 2, one paragraph that helps, nothing written, nothing changed, no hang.

The table is data: a command, the words after it, a fragment of the answer. ``{x}`` names something in the world of the
tests (``World``). Commands run in this process as a console would run them; a handful run as programs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from i2am_train.cli import main
from i2am_train.config.commands import COMMANDS
from i2am_train.config.locations import checkout, dataset_folder
from i2am_train.config.store import compose
from i2am_train.detection.bench import make_shapes
from i2am_train.types import GridSize
from i2am_train.workflows import evaluate

SECONDS = 60
"""Longer than any refusal takes on a busy machine."""

SMALL = "data.root={data} data.height=64 data.width=48 data.workers=0"
"""Options of the small dataset and model, in one word of the table."""

MODEL = f"{SMALL} init={{model}} validation.samples=2 evaluation.metrics=[ssim]"
ASK = f"{SMALL} checkpoint={{model}} samples=2 sampling.steps=1"
JUDGE = f"{SMALL} checkpoint={{model}} evaluation.metrics=[ssim]"
FOLDERS = "images={images} reference={reference} evaluation.metrics=[ssim]"
SHOW = f"{SMALL} checkpoint={{model}} sampling.steps=1 attribution.time_groups=1"
PAINT = (
    "model=paint_by_example checkpoint={pipeline} image={images}/0.png mask={mask} "
    "reference={reference}/0.png size=[32,48] sampling.steps=1 attribution.time_groups=1"
)
DETECT = "root={coco} pipeline={pipeline} height=32 width=48 steps=1"
CACHE = "root={data} init={model} output=cache workers=0"

CASES: list[tuple[str, str, list[str], str]] = [
    # command, usual options (words apart by spaces), what is wrong (one word each), a fragment of the answer
    ("train", MODEL, ["seed=18446744073709551616"], "whole number of at most"),
    ("train", MODEL, ["seed=1e30"], "seed=1e+30 is not possible"),
    ("train", MODEL, ["seed=-1"], "expected at least 0"),
    ("train", MODEL, ["seed=" + "9" * 5000], "expected a whole number"),
    ("train", MODEL, ["seed=true"], "seed=True is not possible: expected a whole number"),
    ("train", MODEL, ["seed=0x10"], "seed=0x10 is not possible: expected a whole number"),
    ("train", MODEL, ["--seed", "1"], "Write seed=VALUE."),
    ("train", MODEL, ["--experiment", "refined"], "Write experiment=VALUE."),
    ("train", MODEL, ["seed", "=", "1"], "The option 'seed' cannot be read"),
    ("train", MODEL, ["seed:1"], "The option 'seed:1' cannot be read"),
    ("train", MODEL, ["experiment=Refined"], "no file conf/experiment/Refined.yaml"),
    ("train", MODEL, ["experiment={arms}/nothing.yaml"], "nothing.yaml is missing). Experiments are"),
    ("train", MODEL, ["experiment={arms}/list.yaml"], "holds a list"),
    ("train", MODEL, ["experiment={arms}/my arm (2), new.yaml"], "no option 'objective.dcmll'"),
    ("train", MODEL, ["experiment={arms}/imports.yaml"], "I2AM_ALLOW_IMPORTS=json"),
    ("train", MODEL, ["experiment=demo"], "no option 'arms'"),
    ("train", MODEL, ["experiment=null"], "expected the name of a file of conf/experiment"),
    ("train", MODEL, ["data=null"], "expected the name of a file of conf/data"),
    ("train", MODEL, ["objective=1"], "expected the name of a file of conf/objective"),
    ("train", MODEL, ["trainer=[]"], "expected the name of a file of conf/trainer"),
    ("train", MODEL, ["data.synthetic=null"], "expected a group of options"),
    ("train", MODEL, ["optimization.learning_rate=inf"], "expected a finite number"),
    ("train", MODEL, ["optimization.learning_rate=1e-4,"], "expected a number"),
    ("train", MODEL, ["optimization.learning_rate=1e-4 per step"], "expected a number"),
    ("train", MODEL, ["optimization.learning_rate=true"], "expected a number"),
    ("train", MODEL, ["optimization.betas=[0.9]"], "expected a list of 2 values"),
    ("train", MODEL, ["optimization.steps=0"], "expected at least 1"),
    ("train", MODEL, ["optimization.precision=fp16"], "expected one of 32-true"),
    ("train", MODEL, ["optimization.lora_rank=1000000000"], "between 1 and 4096"),
    ("train", MODEL, ["objective.terms.cwg=nan"], "expected a finite number"),
    ("train", MODEL, ["objective.variant=null"], "expected one of paper"),
    ("train", MODEL, ["objective.terms.mass=1"], "attends to the reference's patches and to no other token"),
    ("train", MODEL, ["objective.terms.leffa=1", "data.cache=/nowhere"], "null with a term that compares pictures"),
    ("train", MODEL, ["objective.terms.dcml=1", "objective.terms.dcml.force=exten"], "expected one of reward, hinge"),
    ("train", MODEL, ["objective.terms.cwg=1", "objective.terms.cwg.entropy_floor=2"], "a number between 0.0 and 1.0"),
    ("train", MODEL, ["objective.layers="], "one of the paper's layers"),
    ("train", MODEL, ["experiment=refined", "objective.layers=mid_block.attentions.7"], "up_blocks.1.attentions.0 (1)"),
    ("train", MODEL, ["attribution.layer=mid_block.attentions.7"], "No attention layer"),
    ("train", MODEL, ["attribution.delta=1.0"], "a number in [0, 1)"),
    ("train", MODEL, ["attribution.penalties=[1,inf]"], "penalties[1]=inf"),
    ("train", MODEL, ["attribution.layers=[]"], "null for all, or a list that is not empty"),
    ("train", MODEL, ["sampling.seed=1e25"], "whole number of at most"),
    ("train", MODEL, ["evaluation.metrics=[SSIM]"], "No metric is called 'SSIM'"),
    ("train", MODEL, ["evaluation.metrics=[json:loads]"], "called with (generated, real)"),
    ("train", MODEL, ["evaluation.metrics=ssim"], "expected a list"),
    ("train", MODEL, ["data.workers=100000"], "between 0 and 512"),
    ("train", MODEL, ["data.batch_size=1000000000"], "fewer than one batch"),
    ("train", MODEL, ["validation.samples=20"], "validation samples cannot be held out"),
    ("train", MODEL, ["data.height=128", "data.width=96"], "made for images of 64x48"),
    ("train", MODEL, ["data.height=16000000"], "a multiple of 16 between 16 and 16384"),
    ("train", MODEL, ["data.height=64px"], "expected a whole number"),
    ("train", MODEL, ["data.root="], "data.root='' is not possible: expected a path"),
    ("train", MODEL, ["data.root={empty}"], "no pair list"),
    ("train", MODEL, ["data.root={text}"], "no pair list"),
    ("train", MODEL, ["data.root={images}"], "no pair list"),
    ("train", MODEL, ["data.root=grösse (1) #2, a=b & c"], "grösse (1) #2, a=b & c has no pair list"),
    ("train", MODEL, ["data.root='a b"], "cannot be read"),
    ("train", MODEL, ["data.root=${nowhere}"], "Interpolation key 'nowhere' not found"),
    ("train", MODEL, ["data.layout=mine"], "expected one of auto, viton_hd, dresscode"),
    ("train", MODEL, ["data.layout=nowhere:Mine"], "No module named 'nowhere'"),
    ("train", MODEL, ["data.layout=json:JSONDecoder"], "does not derive from Layout"),
    (
        "train",
        MODEL,
        ["data.layout=i2am_train.data.layouts:Layout"],
        "lacks advice, category, folder, label, list_file, own_garment",
    ),
    (
        "train",
        MODEL,
        ["data.layout=i2am_train.data.layouts:DressCodeLayout"],
        "missing a required argument: 'category'",
    ),
    ("train", MODEL, ["data.layout=dresscode"], "no folder upper_body"),
    ("train", MODEL, ["data.cache={empty}"], "There is no cache in"),
    ("train", MODEL, ["data.cache={caches}/list"], "is not the index of a cache"),
    ("train", MODEL, ["data.cache={caches}/missing"], "train-000000.safetensors is missing"),
    ("train", MODEL, ["data.cache="], "a folder or a URL, or null"),
    ("train", MODEL, ["init={pipeline}"], "lacks reference_encoder"),
    ("train", MODEL, ["init={data}"], "no try-on model"),
    ("train", MODEL, ["init={empty}/nowhere"], "no checkpoint folder"),
    ("train", MODEL, ["init=~nobody42/model"], "there is no user nobody42"),
    ("train", MODEL, ["init=hub:x"], "names no model on the hub"),
    ("train", MODEL, ["output=~nobody42/x"], "there is no user nobody42"),
    ("train", MODEL, ["output={text}"], "is a file"),
    ("train", MODEL, ["output={data}"], "lie inside"),
    ("train", MODEL, ["output=/"], "lie inside /, which is to be"),
    ("train", MODEL, ["name=.."], "names a folder"),
    ("train", MODEL, ["name=" + "n" * 300], "at most 60 signs"),
    ("train", MODEL, ["label=a\nb"], "one line of at most 100 letters"),
    ("train", MODEL, ["tracking.project=a/b"], "without / "),
    ("train", MODEL, ["tracking.tags=['']"], "1 to 64 signs in a tag"),
    ("train", MODEL, ["trainer.progress_bar=1"], "expected true or false"),
    ("train", MODEL, ["trainer.devices=true"], "expected a whole number or a text"),
    ("train", MODEL, ["trainer.devices=two"], "int > 0"),
    ("train", MODEL, ["trainer.accelerator=gpux"], "Available names are"),
    ("train", MODEL, ["trainer.strategy=ddpp"], "invalid strategy"),
    ("train", MODEL, ["callbacks=json:loads"], "expected a list"),
    ("train", MODEL, ["callbacks=[timer]"], "expected package.module:name"),
    ("train", MODEL, ["callbacks=[{every: 3}]"], "{{fn: package.module:name, ...}}"),
    ("train", MODEL, ["callbacks=[nowhere.at:all]"], "No module named 'nowhere'"),
    (
        "train",
        MODEL,
        ["callbacks=[tests.support.callbacks:late]"],
        "has a method on_train_batch_end that cannot be called",
    ),
    ("train", MODEL, ["callbacks=[tests.support.callbacks:Late]"], "its arguments are (self, trainer, module)"),
    ("train", MODEL, ["objective.terms.mine={fn: tests.support.terms:mass}"], "a weight, too: {{fn: tests"),
    ("train", MODEL, ["callbacks=[json:load_s]"], "json has no 'load_s' (it has: loads, load)"),
    ("train", MODEL, ["callbacks=[json:loads]"], "cannot be called with ()"),
    ("train", MODEL, ["callbacks=[json:JSONDecoder]"], "does not derive from lightning.Callback"),
    ("train", MODEL, ["callbacks=[{fn: json:loads, s: '1'}]"], "returned a int"),
    ("train", MODEL, ["objective.terms.mine={fn: nowhere.at:all, weight: 1}"], "No module named 'nowhere'"),
    ("train", MODEL, ["objective.terms.mine={fn: mine, weight: 1}"], "expected package.module:name"),
    ("train", MODEL, ["objective.terms.mine={fn: tests.support.terms:mas, weight: 1}"], "has no 'mas' (it has: mass"),
    ("train", MODEL, ["objective.terms.mine={fn: string:digits, weight: 1}"], "cannot be called: it is of type str"),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:two_of_them, weight: 1}"],
        "missing a required argument: 'other'",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:mass, weight: 1, sigma: 2}"],
        "unexpected keyword argument 'sigma'",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:batch_mean, weight: 1}"],
        "returns () of torch.float32 for a batch of 2 samples",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:constant, weight: 1}"],
        "returns values without a gradient",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:empty_mean, weight: 1}"],
        "mask.sum().clamp(min=1)",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:offset, weight: 1}"],
        "attention.target is None without needs: [target]",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:mass, weight: .nan}"],
        "weight=.nan is not possible",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:mass, weight: -1}"],
        "weight=-1.0 is not possible: expected at least 0",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.tv={fn: tests.support.terms:mass, weight: 1}"],
        "a name that is not taken, as 'tv' is",
    ),
    (
        "train",
        MODEL,
        ["objective.terms.my-loss={fn: tests.support.terms:mass, weight: 1}"],
        "letters, digits and underscores",
    ),
    ("train", MODEL, ["objective.terms=mine"], "expected a mapping"),
    ("train", MODEL, ["objective.terms.cvg=1"], "Did you mean 'cwg'?"),
    ("train", MODEL, ["objective.terms.cwg={weight: 1, sigm: 1}"], "has no keyword 'sigm'. Its own are sigma"),
    (
        "train",
        MODEL,
        ["objective.terms.cwg={weight: 1, schedule: [early, late]}"],
        "one of constant, early, late, ramp",
    ),
    ("train", MODEL, ["objective.terms.cwg={weight: 1, timesteps: [0, 1001]}"], "an end of at most 1000"),
    ("train", MODEL, ["experiment=refined", "objective.layers=[2,up_blocks.1.attentions.1]"], "a layer twice"),
    ("train", MODEL, ["experiment=refined", "objective.layers={2: 0}"], "objective.layers.2=0.0 is not possible"),
    ("train", MODEL, ["--cfg", "jobs"], "invalid choice: 'jobs'"),
    ("train", MODEL, ["+objective.weight=1"], "no option 'objective.weight'"),
    ("train", MODEL, ["checkpoint={model}"], "no option 'checkpoint'"),
    ("evaluate", SMALL, [], "What to judge is not clear"),
    ("evaluate", JUDGE, ["evaluation.metrics=[nope]"], "No metric is called 'nope'"),
    ("evaluate", JUDGE, ["evaluation.metrics=[nowhere:psnr]"], "No module named 'nowhere'"),
    ("evaluate", JUDGE, ["evaluation.metrics=[torch:dist]"], "shape [] for 2 samples"),
    ("evaluate", JUDGE, ["evaluation.metrics=[json:JSONDecoder]"], "from torchmetrics.Metric"),
    ("evaluate", JUDGE, ["evaluation.metrics=[json:loads]"], "called with (generated, real)"),
    ("evaluate", JUDGE, ["evaluation.metrics=[{label: PSNR}]"], "{{fn: package.module:name, ...}}"),
    ("evaluate", JUDGE, ["evaluation.samples=7"], "7 test samples were asked for"),
    ("evaluate", JUDGE, ["attribution.layer=up_blocks.9"], "No attention layer"),
    ("evaluate", JUDGE, ["evaluation.pairing=Paired"], "Did you mean 'paired'?"),
    ("evaluate", JUDGE, ["checkpoint="], "expected a folder, or tiny"),
    ("evaluate", JUDGE, ["checkpoint={text}"], "is a file, and a checkpoint is a folder"),
    ("evaluate", JUDGE, ["init={model}"], "no option 'init'"),
    ("evaluate", JUDGE, ["images={images}"], "What to judge is not clear"),
    ("evaluate", JUDGE, ["data.height=128", "data.width=96"], "made for images of 64x48"),
    ("evaluate", JUDGE, ["snapshots=true"], "holds no snapshots"),
    ("evaluate", JUDGE, ["output={torn}"], "not readable JSON"),
    ("evaluate", JUDGE, ["output={text}/x"], "text.txt"),
    ("evaluate", FOLDERS, ["images={textual}", "reference={textual}"], "is no picture"),
    ("evaluate", FOLDERS, ["images={empty}"], "holds no images"),
    ("evaluate", FOLDERS, ["images={text}"], "There is no folder"),
    ("evaluate", FOLDERS, ["images="], "expected a path"),
    ("evaluate", FOLDERS, ["reference={single}"], "do not pair up"),
    ("evaluate", FOLDERS, ["resize=64x48"], "expected a list of 2 values"),
    ("evaluate", FOLDERS, ["resize=[99999,1]"], "between 1 and 16384"),
    ("evaluate", FOLDERS, ["evaluation.metrics=[imacs_g]"], "No image metric is called"),
    ("evaluate", FOLDERS, ["evaluation.metrics=[torch:equal]"], "shape [] for 2 samples"),
    ("evaluate", FOLDERS, ["evaluation.metrics=[]"], "at least one image metric"),
    ("evaluate", FOLDERS, ["output={images}/run"], "lies among the data"),
    ("ablate", MODEL, ["arms=[baseline,{arms}/list.yaml]"], "holds a list"),
    ("ablate", MODEL, ["arms=[baseline,{arms}/empty.yaml]"], "holds nothing"),
    ("ablate", MODEL, ["arms=[baseline,{arms}/binary.yaml]"], "cannot be read as YAML"),
    ("ablate", MODEL, ["arms=[baseline,{arms}/my arm (2), new.yaml]"], "no arm"),
    ("ablate", MODEL, ["arms=[baseline,'{arms}/my arm (2), new.yaml']"], "no option 'objective.dcmll'"),
    ("ablate", MODEL, ["arms=[baseline,{images}/0.png]"], "no arm"),
    ("ablate", MODEL, ["arms=[baseline,{arms}/label.yaml]"], "one line of at most 100 letters"),
    ("ablate", MODEL, ["arms=[baseline,{arms}/copy.yaml,refined]"], "both called Refined"),
    ("ablate", MODEL, ["arms=[{arms}/list.yaml,{arms}/one/list.yaml]", "reference={arms}/list.yaml"], "list.yaml"),
    ("ablate", MODEL, ["arms=[baseline,{arms}/imports.yaml]"], "I2AM_ALLOW_IMPORTS=json"),
    (
        "ablate",
        MODEL,
        ["objective.terms.mine={fn: tests.support.terms:mass, weight: 1}"],
        "set them in the file of an arm",
    ),
    ("ablate", MODEL, ["arms=[baseline,{arms}/term.yaml]"], "I2AM_ALLOW_IMPORTS=json"),
    ("ablate", MODEL, ["arms=[Baseline]"], "no arm 'Baseline'"),
    ("ablate", MODEL, ["arms=[baseline,]"], "cannot be read"),
    ("ablate", MODEL, ["seeds=0"], "expected a list"),
    ("ablate", MODEL, ["confidence=95"], "a number in [0, 1)"),
    ("ablate", MODEL, ["bootstrap_samples=1000000000"], "between 100 and 1000000"),
    ("ablate", MODEL, ["trainer.devices=2"], "trainer.devices=2"),
    (
        "ablate",
        MODEL,
        ["arms=[base,refined]", "reference=refined", "attribution.layers=[nowhere]"],
        "No attention layer",
    ),
    ("explain", SHOW, ["sample=6"], "numbered from 0 to 5"),
    ("explain", SHOW, ["sample=first"], "expected a whole number"),
    ("explain", SHOW, ["attribution.time_groups=5"], "at most sampling.steps=1"),
    ("explain", SHOW, ["attribution.layer=nowhere"], "No attention layer"),
    ("explain", SHOW, ["generated_patches=[1,2]"], "expected a list of 2 values"),
    ("explain", SHOW, ["image={images}/0.png"], "is for other people's models"),
    ("explain", SHOW, ["checkpoint=[{model},{model}]"], "all different"),
    ("explain", SHOW, ["output={images}"], "holds files"),
    ("explain", SHOW, ["output={torn}"], "not readable JSON"),
    ("explain", PAINT, ["output={images}"], "holds files"),
    ("explain", PAINT, ["image={text}"], "is no picture"),
    ("explain", PAINT, ["image={images}"], "is a folder and no file"),
    ("explain", PAINT, ["mask={black}"], "no white pixel"),
    ("explain", PAINT, ["mask=null"], "mask= was not given"),
    ("explain", PAINT, ["checkpoint={model}"], "needs the folder of a"),
    ("explain", PAINT, ["size=64x48"], "expected a list of 2 values"),
    ("explain", PAINT, ["prompt=hello"], "means nothing to model=paint_by_example"),
    ("explain", PAINT, ["model=paintbyexample"], "Did you mean 'paint_by_example'?"),
    ("explain", PAINT, ["sampling.guidance=inf"], "expected a finite number"),
    (
        "explain",
        "model=factory reference={reference}/0.png sampling.steps=1 attribution.time_groups=1",
        ["factory=json:loads"],
        "takes (checkpoint, device)",
    ),
    (
        "explain",
        "model=factory reference={reference}/0.png sampling.steps=1 attribution.time_groups=1",
        ["factory=tests.support.stableviton_like:build", "recipe=json:decoder"],
        "recipe=json:decoder cannot be called: it is of type module",
    ),
    ("faithful", ASK, ["shares=[0.5,0.25]"], "different numbers in ascending order"),
    ("faithful", ASK, ["shares=[0.5,1.5]"], "more than 0 and at most 1"),
    ("faithful", ASK, ["layers=[else]"], "No attention layer is called 'else'"),
    ("faithful", ASK, ["output={data}"], "this command's own folder"),
    ("diagnose", ASK, ["layers=[else]"], "No attention layer is called 'else'"),
    ("diagnose", ASK, ["least_use=-1"], "least_use=-1"),
    ("detect", DETECT, ["root={empty}"], "instances_val2017.json"),
    ("detect", DETECT, ["root={images}"], "instances_val2017.json"),
    ("detect", DETECT, ["split=train2017"], "instances_train2017.json"),
    ("detect", DETECT, ["annotations={text}"], "text.txt"),
    ("detect", DETECT, ["annotations={torn}/results.json"], "results.json"),
    ("detect", DETECT, ["annotations={nonsense}"], "nonsense.json"),
    ("detect", DETECT, ["pipeline={model}"], "model"),
    ("detect", DETECT, ["pipeline={text}"], "text.txt"),
    ("detect", DETECT, ["detectors=[torchvision:nope]"], "no detector 'nope'"),
    ("explain", "", ["factory=json:loads", "reference={reference}/0.png"], "Add model=factory."),
    ("detect", DETECT, ["detectors=[nowhere:Mine]"], "No module named 'nowhere'"),
    ("detect", DETECT, ["detectors=[json:JSONDecoder]"], "a JSONDecoder has no method detect. Expected"),
    ("detect", DETECT, ["detectors=[{fn: json:JSONDecoder, strict: false}]"], "a JSONDecoder has no method detect"),
    ("detect", DETECT, ["detectors=[{fn: json:JSONDecoder, share: 0.3}]"], "unexpected keyword argument 'share'"),
    ("detect", DETECT, ["detectors=[{share: 0.3}]"], "expected package.module:name, or {{fn: package.module:name"),
    ("detect", DETECT, ["detectors=[json:loads]"], "cannot be called with ()"),
    ("detect", DETECT, ["delta=40"], "a number in [0, 1)"),
    ("detect", DETECT, ["samples=0"], "expected at least 1"),
    ("detect", DETECT, ["height=1e9"], "a multiple of 16"),
    ("detect", DETECT, ["output={images}"], "holds files"),
    ("report", "", [], "nothing to report"),
    ("report", "", ["runs={evaluation}"], "expected a list"),
    ("report", "", ["runs=[{empty}]"], "empty"),
    ("report", "", ["runs=[{torn}]"], "torn"),
    ("report", "", ["runs=[{alien}]"], "alien"),
    ("report", "", ["runs=[{text}]"], "text.txt"),
    ("report", "", ["runs=[{model}]"], "model"),
    ("report", "", ["explained=[{evaluation}]"], "i2am explain"),
    ("report", "", ["explained=[{torn}]"], "torn"),
    ("report", "", ["detected=[{evaluation}]"], "i2am detect"),
    ("report", "runs=[{evaluation}]", ["names=[a,b]"], "names"),
    ("report", "runs=[{evaluation}]", ["names=['a\nb']"], "one line of at most 100 letters"),
    ("report", "runs=[{evaluation}]", ["formats=[jpg]"], "expected one of png, svg, pdf"),
    ("report", "runs=[{evaluation}]", ["dpi=0"], "between 50 and 1200"),
    ("report", "runs=[{evaluation}]", ["layers=[]"], "a list that is not empty"),
    ("report", "runs=[{evaluation}]", ["output={evaluation}"], "evaluation"),
    ("export", "output=out", [], "checkpoint is required"),
    ("export", "checkpoint={model}", [], "output is required"),
    ("export", "checkpoint={model} output=out", ["checkpoint={empty}"], "no try-on model"),
    ("export", "checkpoint={model} output=out", ["output={data}"], "data"),
    ("export", "checkpoint={model} output=out", ["output={model}"], "model"),
    ("export", "checkpoint={model} output=out", ["output={text}"], "text.txt"),
    ("export", "checkpoint={model} output=out", ["output={images}"], "not an empty folder"),
    ("export", "checkpoint={model} output=out", ["dtype=fp16"], "expected one of float32"),
    ("export", "checkpoint={model} output=out", ["push=nobody"], "expected USER/NAME"),
    ("init", "output=out", [], "What to start from is not clear"),
    ("init", "output=out", ["unet={text}"], "text.txt"),
    ("init", "output=out", ["unet={empty}"], "empty"),
    ("init", "output=out", ["unet=a", "custom=b"], "What to start from is not clear"),
    ("init", "output=out", ["custom={text}"], "text.txt"),
    ("init", "output=out", ["custom={images}/0.png"], "0.png"),
    ("init", "output=out", ["paint_by_example={empty}"], "empty"),
    ("init", "output=out", ["unet={model}/unet", "vae={text}", "encoder={text}"], "text.txt"),
    ("init", "unet={model}/unet", ["output={model}"], "exists"),
    ("init", "output=out", ["unet=x", "projector_blocks=1000000"], "between 0 and 1000"),
    ("init", "output=out", ["unet=x", "prediction_type=v"], "expected one of"),
    ("dashboard", "", ["output="], "expected a path"),
    ("dashboard", "", ["output={images}"], "images"),
    ("dashboard", "", ["output={text}/x.json"], "text.txt"),
    ("dashboard", "", ["project=a/b"], "without / "),
    ("data_make", "", ["root={text}"], "text.txt"),
    ("data_make", "", ["root={images}", "train=2", "test=2"], "images"),
    ("data_make", "", ["train=0"], "between 1 and 10000000"),
    ("data_make", "", ["train=1000000000000"], "between 1 and 10000000"),
    ("data_make", "", ["height=100"], "a multiple of 16"),
    ("data_make", "", ["seed=inf"], "expected a finite number"),
    ("data_make", "", ["workers=99999"], "between 1 and 512"),
    ("data_make", "", ["annotations=true"], "Add root=FOLDER"),
    ("data_derive", "", [], "root is required"),
    ("data_derive", "", ["root={empty}"], "empty"),
    ("data_derive", "", ["root={text}"], "text.txt"),
    ("data_derive", "", ["root={data}", "parser={empty}"], "empty"),
    ("data_derive", "", ["root={images}", "parser={empty}"], "{images} has no pair list"),
    ("data_derive", "", ["root={data}", "category=shirts"], "expected one of upper_body"),
    ("data_match", "", [], "root is required"),
    ("data_match", "", ["root={images}"], "{images} has no pair list"),
    ("data_match", "", ["root={data}"], "holds a correspondence that this command did not make"),
    ("data_match", "", ["root={data}", "workers=0"], "between 1 and 512"),
    ("data_check", "", ["root={data}", "height=64"], "Set both, or neither"),
    ("data_check", "", ["root={data}", "height=-1", "width=-1"], "between 1 and"),
    ("data_check", "", ["root="], "expected a path"),
    ("data_check", "", ["root={data}", "fix=true"], "no option 'fix'"),
    ("data_cache", "", ["root={data}"], "output is required"),
    ("data_cache", CACHE, ["root={empty}"], "no pair list"),
    ("data_cache", CACHE, ["output=s3://bucket/x"], "a folder; copy it"),
    ("data_cache", CACHE, ["output={data}/train/cache"], "lies among the data"),
    ("data_cache", CACHE, ["output={images}"], "is no cache"),
    ("data_cache", CACHE, ["output={caches}/list"], "is not the index of a cache"),
    ("data_cache", CACHE, ["splits=[]"], "names nothing twice"),
    ("data_cache", CACHE, ["splits=[val]"], "expected one of train, test"),
    ("data_cache", CACHE, ["init={pipeline}"], "lacks reference_encoder"),
    ("data_cache", CACHE, ["variants=1000000000"], "between 0 and 10000"),
]
if not torch.cuda.is_available():
    CASES += [
        ("evaluate", JUDGE, ["device=cuda"], "no CUDA device"),
        ("explain", SHOW, ["device=cuda"], "no CUDA device"),
    ]


@pytest.fixture(scope="module")
def world(
    small_dataset: Path, small_checkpoint: Path, paint_by_example: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Good and bad things by the names that the table has for them."""
    root = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(0)
    for name, count in (("images", 3), ("reference", 3), ("single", 1)):
        (root / name).mkdir()
        for index in range(count):
            pixels = draw.integers(0, 256, (64, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    mask = np.zeros((64, 48), np.uint8)
    Image.fromarray(mask).save(root / "black.png")
    mask[20:40, 10:30] = 255
    Image.fromarray(mask).save(root / "mask.png")
    (root / "text.txt").write_text("hello\n")
    (root / "empty").mkdir()
    _write(root / "textual", {"0.png": "hello", "1.png": "hello"})
    whole = ("results", "settings", "manifest", "explained", "index")
    _write(root / "torn", {f"{name}.json": '{"schema": 1, "kin' for name in whole})
    _write(root / "alien", {f"{name}.json": '{"kind": "ours"}' for name in whole})
    _write(root, {"nonsense.json": '{"images": 3, "annotations": "x", "categories": null}'})
    _write(
        root / "arms",
        {
            "list.yaml": "- 1\n",
            "empty.yaml": "",
            "one/list.yaml": "- 2\n",
            "binary.yaml": "\0\1\2",
            "my arm (2), new.yaml": "objective: {dcmll: 1}\n",
            "label.yaml": 'label: "a\\nb"\n',
            "copy.yaml": "label: Refined\n",
            "imports.yaml": "callbacks: [json:loads]\n",
            "term.yaml": "objective: {terms: {mine: {fn: json:loads, weight: 1.0}}}\n",
        },
    )
    _write(root / "caches", {"list/index.json": "[1, 2]", "missing/index.json": _cache_index()})
    folders = {name: str(root / name) for name in ("images", "reference")}
    places = {path.stem: str(path) for path in root.iterdir()} | folders
    places |= {"data": str(small_dataset), "model": str(small_checkpoint)}
    places |= {"pipeline": str(paint_by_example), "coco": str(make_shapes(root / "coco", 2))}
    words = f"{FOLDERS} output={root / 'evaluation'} device=cpu progress_bar=false tracking=files"
    config = compose("evaluate", words.format(**places).split())
    evaluate.evaluate(config, root / "evaluation")
    return places | {"evaluation": str(root / "evaluation")}


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _cache_index() -> str:
    key = dict.fromkeys(("vae", "reference_encoder", "garment_input", "data", "reading"), "x")
    shard = {"file": "train-000000.safetensors", "first": 0, "samples": 2, "bytes": 9, "sha256": ""}
    layout = {"dtype": "float32", "variants": 0, "seed": 0, "shard_samples": 128}
    index = {"format": 2, "key": key | {"image_size": "64x48"}, "layout": layout}
    shards = {"train": [shard | {"crc32": [0, 0]}]}
    return json.dumps(index | {"samples": {"train": 2}, "shards": shards})


@pytest.fixture
def quick_process(fresh_process: None) -> Iterator[None]:
    """A command ends with an error where it takes too long."""

    def too_long(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _everything(world: dict[str, str]) -> set[tuple[str, int, int]]:
    """All files of the world with size and time, and all folders, in which a lock may have lain for a moment."""
    files = [file for place in world.values() for file in [Path(place), *Path(place).rglob("*")]]
    folders = {(str(file), 0, 0) for file in files if file.is_dir()}
    stats = ((str(file), file.stat()) for file in files if file.is_file())
    return folders | {(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats}


def _words(usual: str, wrong: list[str], world: dict[str, str]) -> list[str]:
    # ${...} and {fn: ...} are meant as they stand
    return [w if "${" in w or ": " in w else w.format(**world) for w in (*usual.split(), *wrong)]


def _is_a_paragraph(printed: str, message: str) -> None:
    assert printed.startswith("i2am: ")
    assert printed.count("\n") == 1
    assert len(printed) < 1500
    assert "Traceback" not in printed
    assert message in printed


def test_there_are_a_hundred() -> None:
    """No case stands there twice, and every command has its own."""
    assert len(CASES) == len({(c, usual, *wrong) for c, usual, wrong, _ in CASES}) >= 100
    assert {command for command, *_ in CASES} == set(COMMANDS)


@pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations
@pytest.mark.usefixtures("quick_process")
@pytest.mark.parametrize(
    ("command", "usual", "wrong", "message"), CASES, ids=[f"{c}-{' '.join(wrong)[:60]!a}" for c, _, wrong, _ in CASES]
)
def test_bad_input(
    command: str, usual: str, wrong: list[str], message: str, world: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one paragraph with the fragment, and every file is as it was."""
    before = _everything(world)
    with pytest.raises(SystemExit, match="2"):
        main([*command.split("_"), *_words(usual, wrong, world)])
    _is_a_paragraph(capsys.readouterr().err, message.format(**world))
    assert list(Path.cwd().iterdir()) == []
    assert _everything(world) == before


@pytest.mark.usefixtures("quick_process")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate checkpoint=tiny evaluation.metrics=[nope]", "No metric is called 'nope'"),
        ("evaluate checkpoint=tiny attribution.layer=mid", "mid"),
        ("evaluate checkpoint=tiny evaluation.samples=3", "at most data.synthetic.test=2"),
        ("train evaluation.metrics=[nope]", "No metric is called 'nope'"),
        ("train objective.terms.dcml=0.1 objective.layers=mid", "mid"),
        ("train trainer.keep_best=nope", "nope"),
        ("train callbacks=[nope:It]", "nope"),
        ("train validation.samples=32", "data.synthetic.train=5 is not possible"),
        ("train output={used}", "a run of another configuration"),
        ("ablate arms=[base,{arm}] reference=base", "mid"),
        ("ablate evaluation.metrics=[nope]", "No metric is called 'nope'"),
        ("explain checkpoint=tiny sample=2", "less than data.synthetic.test=2"),
        ("explain checkpoint=tiny attribution.layer=mid", "No attention layer is called 'mid'"),
        ("explain checkpoint=tiny generated_patches=[[16,0]]", "Patch (16, 0) lies outside the grid of 16x12"),
        ("explain checkpoint=tiny reference_patches=[[0,12]]", "Patch (0, 12) lies outside the grid of 16x12"),
        ("evaluate checkpoint=tiny evaluation.kernel_subset_size=3", "subsets of 3 images, and there are 2 generated"),
        ("ablate evaluation.kernel_subset_size=3", "subsets of 3 images, and there are 2 generated"),
    ],
)
def test_cheap_checks_come_before_a_dataset_is_drawn(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that is wrong without a look at the data is refused before the embedded dataset is made."""
    folder = dataset_folder(GridSize(128, 96), 5, 2, 987654)
    made = ["data.synthetic.train=5", "data.synthetic.test=2", "data.synthetic.seed=987654"]
    small = [] if words.startswith(("evaluate", "explain")) else ["data.batch_size=2"]
    held_out = [] if "validation" in words or not small else ["validation.samples=2"]
    arm = tmp_path / "arm.yaml"
    arm.write_text("objective: {layers: mid, terms: {dcml: {weight: 0.1}}}\n")
    used = tmp_path / "used"
    used.mkdir()
    (used / "settings.json").write_text('{"seed": 5}')
    with pytest.raises(SystemExit, match="2"):
        main([*words.format(arm=arm, used=used).split(), *made, *small, *held_out])
    _is_a_paragraph(capsys.readouterr().err, message)
    assert not folder.exists()


OF_A_PROGRAM = {
    "trian": "Did you mean 'train'?",
    "data chek": "Did you mean 'check'?",
    "data show": "There are make, derive, match, check, cache.",
    "train --experiment refined": "Write experiment=VALUE.",
    "evaluate seed=1 --cfg job": "Did you mean",
    "data make train=1e30": "whole number of at most",
}
PROGRAM = """
import sys
from i2am_train.cli import main

for words in sys.argv[1:]:
    try:
        main(words.split())
    except SystemExit as stop:
        print(stop.code)
"""


def test_bad_input_of_a_program(tmp_path: Path) -> None:
    """The same in a process that has imported nothing; one paragraph each."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *OF_A_PROGRAM], capture_output=True, text=True, check=False, timeout=90,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(checkout())},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["2"] * len(OF_A_PROGRAM)
    for printed, message in zip(done.stderr.splitlines(keepends=True), OF_A_PROGRAM.values(), strict=True):
        _is_a_paragraph(printed, message)
    assert list(tmp_path.iterdir()) == []
