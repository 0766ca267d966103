"""Write tests/lecture.ipynb, the lessons of the four files as a notebook. Functions and classes are
cut out of the files, so that the notebook and the files never differ.

    python tests/lecture.py          # writes it
    python tests/lecture.py --run    # also runs its cells here; pictures go to runs/lecture
"""
import ast
import json
import os
import re
import symtable
import sys
from pathlib import Path

# What the README's toy and CamVid reach, and how far seeds are apart
TOY_SEEDS = """The README's toy, 300 iterations of 8 crops in four minutes on 2 CPU cores, reaches
84.5 to 85.1 mIoU with seeds 0 to 4. Photographs are harder: the 367 of CamVid gave 30.8 to 33.8,
also with seeds 0 to 4, and 31.0 with mmsegmentation, one seed (ResNet-18 from scratch, 800
iterations of 4 crops of 240x320). There two points of difference may be noise."""
TOP = Path(__file__).resolve().parents[1]
NOTEBOOK, LESSONS = TOP / "tests/lecture.ipynb", ("pspnet", "cityscapes", "evaluate", "train")

# Each: what is cut out, "file: names"; the text before it, in which <file> becomes the docstring of
# a file; the cell behind it, to see something.
LECTURE = [("", """# PSPNet: a lecture of an hour
These are the lessons of the four files, cell by cell. (`tests/lecture.py` has cut them out.) Behind
each cell stands something to see: change the cell, run it again, and look what becomes of it. Then
come the questions of a class, and exercises. All cells take two minutes on a CPU. The first draws
28 streets. In Colab it asks for the address of this repository.""", """
import os, subprocess, sys
os.environ["TQDM_DISABLE"] = "1"  # no progress bars
if "google.colab" in sys.modules and not os.path.exists("tests"):
    address = input("The address of the repository, https://...: ")
    subprocess.run(["git", "clone", "-q", address, "pspnet"], check=True)
    os.chdir("pspnet")
if os.path.exists("lecture.ipynb"):  # Jupyter starts in the folder of the notebook
    os.chdir("..")
sys.path.insert(0, "tests")
from PIL import ImageDraw
from pictures import dots_of, legend_of, sheet_of, table_of
from reach import COLUMN, ROW, reach_of, scene_with_scale, street_images
from toy_cityscapes import draw_cityscapes, draw_scene
root = draw_cityscapes("data/lecture", {"train": 24, "val": 4}, (160, 320))"""),
("imports", """What the lessons import (besides each other), and a street.""", """
photograph, label_ids = draw_scene(np.random.default_rng(0), 160, 320)
images = torch.from_numpy(photograph).permute(2, 0, 1)[None]  # a batch of one: (1, 3, H, W)
Image.fromarray(photograph)"""),
("pspnet: MEAN shortcut BasicBlock Bottleneck", """## 1. The network
<pspnet>

We begin with the parts of a ResNet. A residual block adds something to its input. A new block adds
nothing, so training begins as with a shallow network. (Try it without `nn.init.zeros_`.)""", """
x = torch.rand(1, 64, 40, 80)
print("shapes:", tuple(BasicBlock(64, 128, stride=2)(x).shape), tuple(Bottleneck(64, 64)(x).shape))
print("a new block adds at most", (BasicBlock(64, 64)(x) - x).abs().max().item())"""),
("pspnet: stage Variant BACKBONES ResNet", """The backbone. The table above says why stages 3 and 4
are dilated. Below are the shapes, from the first layers to stage 4.""", """
torch.manual_seed(0)
resnet = ResNet("resnet18")
hooks = [part.register_forward_hook(
    lambda part, x, y, name=name: print(f"{name:8} {tuple(y.shape)}"))
    for name, part in resnet.named_children()]
resnet(images.float() / 255)
for hook in hooks:
    hook.remove()"""),
("tests/reach: wake_up", """What do these features look like, before any training? Below are six of
the 512 channels of stage 4: a square is a position. As a new block adds 0, the first row has
passed the first layers and shortcuts only, and one finds the street in it. Then `wake_up` makes the
blocks add something: random sums over ever larger surroundings. Training has to sort them.""", """
rows = []
for title in ("new", "woken up"):
    stage3, stage4 = resnet.eval()(images / 255)
    rows.append([])
    for c in range(6):
        channel = stage4[0, c] - stage4[0, c].min()
        pixels = 255 * (channel / channel.quantile(0.98)).clamp(max=1)
        rows[-1].append((f"{title}: channel {c}", Image.fromarray(pixels.byte().numpy())))
    wake_up(resnet, images / 255)
sheet_of(rows, 6)"""),
("pspnet: ConvBNReLU", """Batch norm is two functions. In train mode it takes mean and variance of
this batch, so its output has mean 0 and deviation 1. In eval mode it takes averages over earlier
batches. They begin with 0 and 1. Each batch replaces a tenth of them. So after n batches 0.9 ** n
of the beginning is left: a third after 10, half a percent after 50.""", """
layer = ConvBNReLU(3, 1, 1)
for n in range(1, 51):
    y = layer.bn(layer.train().conv(images.float()))
    z = layer.bn(layer.eval().conv(images.float()))
    if n in (1, 10, 50):
        print(f"after {n:2} batches: mean and deviation in train mode "
              f"{y.mean():5.2f} {y.std():.2f}, in eval mode {z.mean():5.2f} {z.std():.2f}")"""),
("tests/pictures: averages_of", """Now the idea of the paper. It is easiest to see with the *colors*
of a photograph. The network does it with *features*. Above are averages over k x k regions. Below
is what each position gets back: `bilinear` blends the averages of the nearest regions.""", """
sheet_of(averages_of(Image.fromarray(photograph)), 0.6)"""),
("pspnet: PyramidHead AuxiliaryHead", """The two heads. The first concatenates features and
averages, and classifies. The second is for training: its gradient takes a shorter way.""", """
head = PyramidHead(512, 19).eval()
print("the levels:", *[tuple(level(stage4).shape) for level in head.psp_modules])
print("the heads:", tuple(head(stage4).shape), tuple(AuxiliaryHead(256, 19)(stage3).shape))"""),
("pspnet: PSPNet", """All of it. (After a change of `PyramidHead` run this cell again, too: it has
`Head = PyramidHead`.) In train mode a batch of one fails. The docstring says why.""", """
net = PSPNet(19, "resnet18")
logits, aux_logits = net(torch.cat([images, images.flip(3)]))
print(logits.shape, aux_logits.shape)
try:
    net(images)
except ValueError as error:
    print("a batch of one:", error)"""),
("tests/reach: gradient_of", """
### Why a pyramid, when dilation makes a ResNet see hundreds of pixels anyway?
How much does each pixel change the logits at the dot? That is a gradient. Three new networks, which
differ in their levels, show it. Half of the gradient lies within the ring.""", """
wide = street_images(4)
cells = [scene_with_scale(wide)]
for bins in ((), (2,), (1, 2, 3, 6)):
    torch.manual_seed(0)
    gradient = gradient_of(wake_up(PSPNet(19, "resnet18", bins), wide), wide)
    cells.append(reach_of(f"bins {bins}", gradient, wide))
    if bins == ():
        columns = gradient[ROW - 10:ROW + 11].mean(dim=0)
        for d in (40, 80, 120, 160):
            print(f"no pyramid: {d:3} pixels to the right a pixel counts "
                  f"{columns[COLUMN + d] / columns[COLUMN]:.3%} of one at the dot")
sheet_of([[cell] for cell in cells])"""),
("", """Without a pyramid the network *covers* 56 % of this image: beyond some 170 pixels nothing
counts. And it *weighs* what is near: 120 pixels away a pixel counts about a hundredth. Level 1
gives weight to all. But a gradient shows what can count, not what helps. What helps, the paper's
table 1 shows, on ADE20K: no pyramid 37.23 mIoU, one average (level 1) 40.07, four levels 41.07, and
41.68 if a 1x1 convolution reduces their channels, as here.

### Why 1, 2, 3 and 6?
The lighter a pixel below, the more it counts in the average that the dot gets from a level. So the
four tell what is in the scene, on this side of it, in this part, around here. Would level 6 not be
enough? An average of level 1, 2 or 3 is a mean of some of level 6. But of level 6 a position gets
only the regions around it, and no layer behind the pyramid sees further than its neighbors. So each
level brings a distance. The paper tried level 1 alone and these four; others may be as good. The
cost: the 3x3 convolution reads 512 channels more for each level. With ResNet-50 and 512x1024 pixels
558 GFLOP become 713. (`FastPSPNet`, below the lesson, needs 562.)""", """
row = []
for k in (1, 2, 3, 6):
    x = torch.zeros(1, 1, 156, 318, requires_grad=True)  # 2, 3 and 6 divide both
    p = F.interpolate(F.adaptive_avg_pool2d(x, k), x.shape[2:], mode="bilinear")
    weight, = torch.autograd.grad(p[0, 0, ROW, COLUMN], x)
    pixels = 0.4 * photograph[:156, :318] + 150 * (weight[0, 0] / weight.max()).numpy()[..., None]
    picture = Image.fromarray(pixels.astype(np.uint8))
    dot = (COLUMN - 6, ROW - 6, COLUMN + 6, ROW + 6)
    ImageDraw.Draw(picture).ellipse(dot, "black", outline="white", width=3)
    row.append((f"level {k}: {(weight > 0).float().mean():.0%} of the image", picture))
sheet_of([row], 0.75)"""),
("cityscapes: SceneClass CLASSES VOID TRAIN_IDS to_picture colored", """## 2. The data
<cityscapes>

A label is a map of numbers, which are drawn as colors. (`to_picture` and `colored` come from below
the lesson.)""", """
display(legend_of(CLASSES))
label = np.vectorize(lambda label_id: TRAIN_IDS.get(label_id, VOID))(label_ids).astype(np.uint8)
sheet_of([[("photograph", to_picture(images[0])), ("label", colored(label, CLASSES))]])"""),
("cityscapes: DataError open_picture read_picture read_label paths_by_name Cityscapes", """
The files, and a split of a data set. Only `Cityscapes` matters here: the functions before it read a
file, and say in a sentence what is wrong with it.""", """
train_set, val_set = Cityscapes(root, "train"), Cityscapes(root, "val")
picture, label = train_set[0]
print(len(train_set), "photographs. The first:", train_set.names[0], picture.mode, picture.size)
print("Its label:", label.mode, label.size, "train ids", [value for _, value in label.getcolors()])
try:
    read_label(train_set.picture_paths[train_set.names[0]])  # a photograph is no label
except DataError as error:
    print(error)"""),
("cityscapes: read_pair to_tensors TensorPairs", """From pictures to tensors. (`read_pair` checks.
`TensorPairs` is what a DataLoader gets.) How many pixels has each class? Remember the largest for
chapter 3.""", """
counts = sum(label.flatten().bincount(minlength=256) for _, label in TensorPairs(train_set))
for train_id in counts.nonzero().flatten().tolist():
    share = 100 * counts[train_id].item() / counts.sum().item()
    print(f"{CLASSES[train_id].name:14}{share:5.1f} % {'#' * round(share)}")"""),
("cityscapes: PADDING color_matrix resized_box", """Two tools for training samples. Colors change by
a matrix. A box becomes a crop of a fixed size, so it is scaled. The last photograph is smaller than
its crop.""", """
picture, rows = train_set[0][0], [[], []]
for change in ({}, {"saturation": 0}, {"contrast": 1.5, "brightness": -32}, {"hue": 36}):
    matrix = color_matrix(**change)
    rows[0].append((str(change), picture.convert("RGB", tuple(matrix.flatten()))))
bilinear = Image.Resampling.BILINEAR
for box in ((0, 0, 320, 160), (100, 40, 228, 104), (100, 40, 164, 72)):
    rows[1].append((f"box {box}", resized_box(picture, box, (128, 64), bilinear)))
small = resized_box(picture, (0, 0, 320, 160), (96, 48), bilinear)
rows[1].append(("padded", ImageOps.expand(small, (0, 0, 32, 16), PADDING)))
sheet_of(rows, 0.75)"""),
("cityscapes: TrainingStream", """An endless stream. Sample k depends on seed and k.""", """
stream = TrainingStream(train_set, crop_size=(64, 128), seed=0)
sheet_of([[(f"stream[{k}]", to_picture(stream[k][0])) for k in range(7)],
          [("label", colored(stream[k][1], CLASSES)) for k in range(7)]])"""),
("", """One sample, step by step, with the methods of the stream. (Try another k.)""", """
k = 12
picture, label = train_set[stream.index(k)]
rng = np.random.default_rng([stream.seed, 1, k])
box, cropped_label = stream.choose_crop(label, rng)
crop = resized_box(picture, box, cropped_label.size, bilinear)
changed = crop.convert("RGB", stream.choose_colors(rng))
ImageDraw.Draw(picture).rectangle(box, outline="red", width=3)
sheet_of([[("the box", picture), ("cut and resized", crop), ("its colors changed", changed),
           ("perhaps mirrored: stream[k]", to_picture(stream[k][0]))]])"""),
("evaluate: predict argmax_class autocast", """## 3. How good is it?
<evaluate>

A prediction is at each pixel the class of the largest logit. This network has random weights.
Its 20 x 40 positions become 160 x 320 pixels: hence the soft borders.""", """
sheet_of([[("photograph", to_picture(images[0])),
           ("untrained", colored(predict(wake_up(net, wide), images[0]), CLASSES))]])"""),
("evaluate: confusion_matrix intersection_over_union mean_iou", """Six pixels, one of them void:
make the matrix by hand. Half of the pixels of class 0 were found. Why is its IoU a third?""", """
truth = torch.tensor([[0, 0, 1], [2, 2, VOID]], dtype=torch.uint8)
guess = torch.tensor([[0, 1, 1], [2, 0, 1]], dtype=torch.uint8)
matrix = confusion_matrix(truth, guess, num_classes=4)  # class 3 occurs nowhere
print(matrix, intersection_over_union(matrix), mean_iou(matrix), sep="\\n")"""),
("evaluate: rank_and_world evaluate", """A whole data set. Why not count right pixels? Here is
somebody who calls all sidewalk. (`workers=0`: other processes might not find these cells.)""", """
device = torch.device("cpu")
sidewalk = lambda net, image: torch.ones(image.shape[1:], dtype=torch.uint8)
matrix = evaluate(net, val_set, device, sidewalk, workers=0)
print(f"right pixels {matrix.diag().sum() / matrix.sum():.1%}, mIoU {mean_iou(matrix):.1%}")"""),
("train: poly_lr segmentation_loss", """## 4. Training
<train>

A rate and a loss. A network that knows nothing gives 19 classes the same probability: its loss is
log 19 = 2.94. One of the four pixels below is void. What is 2.94 * 3 / 4?""", """
print([round(poly_lr(iteration, 61), 4) for iteration in (0, 15, 30, 45, 60)])
nothing, label = torch.zeros(1, 19, 2, 2), torch.tensor([[[0, 1], [2, VOID]]])
print(segmentation_loss(nothing, label), segmentation_loss(nothing, label * 0 + VOID))"""),
("train: training_step", """One step, and a loop: `train.main` without checkpoints, processes and
GPUs. It takes half a minute. Why does the loss begin at 4.1? (It is 1.4 * 2.94: that of both heads, of
which the second counts 0.4.) The rate is higher than the recipe's 0.01, because these weights are
random, and 60 iterations are few.""", """
def train(iters, seed=0, batch_size=4):
    torch.manual_seed(seed)
    net, losses = PSPNet(19, "resnet18").train(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    stream = TrainingStream(train_set, crop_size=(64, 128), seed=seed)
    loader = DataLoader(stream, batch_size, sampler=range(iters * batch_size))
    for iteration, (crops, labels) in enumerate(loader):
        optimizer.param_groups[0]["lr"] = poly_lr(iteration, iters, base_lr=0.05)
        losses.append(training_step(net, crops, labels.long(), optimizer, scaler).item())
    return net.eval(), losses

net, losses = train(iters=60)
dots_of("iteration", "loss", loss=list(enumerate(losses)))"""),
("", """Streets that it has never seen. Rows of the matrix are the truth, columns the prediction, in
percent. Which class is found least? What is it taken for?""", """
display(sheet_of([[("photograph", to_picture(image)), ("truth", colored(label, CLASSES)),
                   ("prediction", colored(predict(net, image), CLASSES))]
                  for image, label in TensorPairs(val_set)], 0.8))
matrix = evaluate(net, val_set, device, workers=0)
print(f"mIoU {mean_iou(matrix):.1%}")
present = matrix.sum(dim=1).nonzero().flatten()
table_of(matrix[present][:, present], [CLASSES[i].name for i in present])"""),
("", """When this was written, signs were found least, 62 % of their pixels, and then persons, 67 %:
a quarter of them became the buildings behind. (Other machines add in another order, and after 60
iterations that shows.)

How far does the network see, once trained? Half of the gradient was within 65 pixels when it was
new. With seeds 0 to 4 it is now within 19 to 44: training makes it more local. What a pixel is,
the pixels beside it tell best. The rest is for cases of doubt.""", """
gradient = gradient_of(net, wide[:1])
print(f"{gradient[:, 256:].sum() / gradient.sum():.0%} of the gradient would be 0 with no pyramid")
sheet_of([[reach_of("trained", gradient, wide[:1])]])"""),
("", """## 5. Questions of a class
### How can it find poles, when its map has one position per 8 pixels?
A position has 19 numbers. They can say that a third of it is pole. Neighbors are blended, and the
largest number wins at each pixel: so borders lie between positions, too. Below the *truth* is
reduced to an eighth, in two ways, and stretched. As classes, each position is all of one class. As
shares, it holds the share of each class.""", """
label = TensorPairs(val_set)[1][1]
planes = F.one_hot(label.long(), 256)[..., :19].permute(2, 0, 1)[None].float()
shares = F.avg_pool2d(planes, 8)
classes = F.one_hot(shares.argmax(dim=1), 19).permute(0, 3, 1, 2).float()
row = [("truth", colored(label, CLASSES))]
for title, x in (("classes", classes), ("shares", shares)):
    best = F.interpolate(x, label.shape, mode="bilinear")[0].argmax(dim=0).byte()
    iou = 100 * intersection_over_union(confusion_matrix(label, best, 19))
    title += f": IoU of poles {iou[5]:.0f} %, mean {iou.nanmean():.0f} %"
    row.append((title, colored(best, CLASSES)))
sheet_of([row])"""),
("", """### In training the average is a crop's, in evaluation the photograph's. Is it the same?
No. Here parts of photographs are cut out, with no other change. Below are averages of level 1, in
the two directions in which those of the parts differ most.""", """
@torch.inference_mode()
def features(image):
    return net.backbone(net.normalize(image[None]))[1]

rng, parts, wholes = np.random.default_rng(0), [], []
for i in range(16):
    image, label = TensorPairs(train_set)[i]
    wholes.append(features(image).mean(dim=(2, 3)))
    for _ in range(3):
        top, left = rng.integers(0, (160 - 64, 320 - 128))
        part = image[:, top:top + 64, left:left + 128]  # as large as a crop in training
        parts.append(features(part).mean(dim=(2, 3)))
parts, wholes = torch.cat(parts), torch.cat(wholes)
own = wholes.repeat_interleave(3, dim=0)  # of each part its photograph
for name, differences in {"a part and its photograph": parts - own,
                          "two photographs": wholes[1:] - wholes[:-1]}.items():
    print(f"the averages of {name} are {differences.norm(dim=1).mean():.1f} apart")
middle = parts.mean(dim=0)
directions = torch.linalg.svd(parts - middle).Vh[:2].T
dots_of("first direction", "second", parts=(parts - middle) @ directions,
        photographs=(wholes - middle) @ directions)"""),
("", """### Why does that not hurt?
In both the average tells what is in view. And a photograph shows what many crops show: it lies near
the middle of what the head has learned to use. Is the network better if it sees tiles as large as
crops? And are averages used at all? Hand back zeros, or those of another view.""", """
from evaluate import predict_averaged  # from below the lesson
in_tiles = lambda net, image: predict_averaged(net, image, tile=(64, 128))
print(f"tiles: mIoU {mean_iou(evaluate(net, val_set, device, in_tiles, workers=0)):.1%}")
for name, other in {"zeros": stage4 * 0, "averages of stream[0]": features(stream[0][0]),
                    "averages of another street": features(images[0])}.items():
    hooks = [level[0].register_forward_hook(
        lambda average, x, y: F.adaptive_avg_pool2d(other, average.output_size))
        for level in net.decode_head.psp_modules]
    print(f"{name}: mIoU {mean_iou(evaluate(net, val_set, device, workers=0)):.1%}")
    for hook in hooks:
        hook.remove()"""),
("", """With seeds 0 to 4 tiles gave 1.2 less to 1.9 more, on average 0.1 more. Zeros cost 8 to 27
points, averages of stream[0], which shows cars and road only, 18 to 42. So the network uses the
averages. Those of another street cost 0.5 to 3 only: what it uses is what all these streets share.
The averages can tell it little else here, as all of them show the same classes, at the same places.
Does the pyramid help, then? On these streets that drowns in the noise between seeds. Where the same
shape is a car or a boat, it decides (exercise 6).

### What does this reach, at what cost, and what is noise?
<toy> Nobody has trained it on Cityscapes yet. mmsegmentation's recipe, which it repeats, reached
77.85 mIoU there, in 40,000 iterations of 8 crops of 512x1024. What is noise, exercise 5 shows.

## 6. Exercises
Each names a line. First run the cell below the question. Then change the line, in the cell that is
named, and run that cell. Run the cell below the question again. At last put the line back, and run
its cell. What you should have seen is folded.""", ""),
]

# Title, file, a part that is in it once, what becomes of it, question, cell, what one should see
EXERCISES = [
("Void in the mean", "train", ', reduction="none").mean()', ")",
"""What is the loss of the four pixels now, and of labels that are all void?""", """
label = torch.tensor([[[0, 1], [2, VOID]]])
print(segmentation_loss(nothing, label), segmentation_loss(nothing, label * 0 + VOID))""",
"""`tensor(2.9444) tensor(nan)` on every machine, not 2.2083 and 0. PyTorch divides by the number of
labeled pixels: by 3, not 4, and 0 by 0. (The gradient is 0 even then, but train.py ends a run
whose loss is NaN.)"""),
("A batch of one", "pspnet", '_v1c", bins=(1, 2, 3, 6)):', '_v1c", bins=(2, 3, 6)):',
"""Why does a batch of one train now? What does the network lose?""", """
try:
    print("loss", train(iters=1, batch_size=1)[1])
except ValueError as error:
    print(error)""",
"""First an error: `Expected more than 1 value per channel`. Then a loss, 4.08 to 4.15 with seeds 0
to 2. Level 2 has four values in a channel: they have a variance. The average of all is lost."""),
("Blended labels", "cityscapes", "NEAREST)", "BILINEAR)",
"""Which classes appear that no street has, and where?""", """
labels = torch.stack([TrainingStream(train_set, (64, 128))[k][1] for k in range(40)])
drawn = torch.isin(labels, torch.tensor([0, 1, 2, 5, 7, 8, 10, 11, 13, VOID]))  # in the streets
print(f"{1 - drawn.float().mean():.1%} of the pixels have a class that no street has")
sheet_of([[(f"label {k}", colored(labels[k], CLASSES)) for k in range(3)]], 3)""",
"""0.0 % become 2.0 % (seeds 0 to 4: 1.7 to 2.3 %): wall, fence, traffic light, terrain, rider. They
lie on borders: between road, 0, and car, 13, come 1 to 12. Some of these are classes of the street
as well, so still more pixels are wrong. Train ids are names, not amounts."""),
("Stage 4 without dilation", "pspnet", "first_dilation=2, dilation=4", "first_dilation=1, dilation=1",
"""How far does a position see now? Would weights of ImageNet load? Would they fit?""", """
torch.manual_seed(0)
gradient = gradient_of(wake_up(PSPNet(19, "resnet18", ()), wide), wide)
caption, picture = reach_of("no pyramid", gradient, wide)
print(caption)
picture""",
"""56 % become 49 %, and 51 pixels 37 (seeds 0, 1, 2: 48 to 51 become 36 to 37). Weights would load:
their shapes are the same. They would not fit: they have learned to read positions 16 and 32 pixels
apart, and would get others, 8 pixels apart."""),
("Noise", "train", "0.4 * segmentation_loss", "0.0 * segmentation_loss",
"""Train with three seeds before and after. Does the auxiliary loss help?""", """
seeds = ()  # Write (0, 1, 2). Then the cell takes a minute or two.
for seed in seeds:
    print(seed, mean_iou(evaluate(train(iters=60, seed=seed)[0], val_set, device, workers=0)))""",
"""With it 0.71, 0.74 and 0.68, on average 0.71. Without it 0.68, 0.69 and 0.67, on average 0.68: does
it help by 0.03? Seeds 3 and 4 gave 0.67 and 0.64 with it, 0.65 and 0.67 without. That leaves 0.016,
while the five with it lie between 0.64 and 0.74. To see so small a difference takes some thirty
seeds of each. (On another machine the numbers differ.)"""),
("Context from one level", "tests/context", 'average": (1,)', 'average": (1,), "2 x 2": (2,)',
"""Cars and boats look the same there. The left end of the picture tells which they are. Run `python
tests/context.py runs/quick --quick`: six minutes. Level 1 helps. Why does level 2 not?""", "",
"""IoU of cars and boats with two seeds: no pyramid 24 and 26 % (24 to 26), level 1 58 and 62 (47 to
70), level 2 26 and 23 (18 to 28), all four 51 and 48. Of the gradient of car against boat 18 to
22 % lies on the street or river with level 1, and less than 0.01 % with level 2: the right half
hardly sees the left. (Who guesses cars or boats, half of each, has an IoU of a third at best.)"""),
]


def cut_out(file, names):
    """These functions, classes and constants, with the comments above them."""
    source = (TOP / f"{file}.py").read_text()
    lines, statements, blocks = source.splitlines(), ast.parse(source).body, []
    for name in names.split():
        i = next(i for i, node in enumerate(statements)
                 if re.match(rf"(def |class |){name}\b", lines[node.lineno - 1]))
        first, last = statements[i - 1].end_lineno, statements[i].end_lineno
        blocks.append("\n".join(lines[first:last]).strip())
    return "\n\n\n".join(blocks)


def names_in(code):
    """The names that a module defines."""
    symbols = symtable.symtable(code, "", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()}


def cells_of_lecture():
    """(kind, text) of all cells. Raises AssertionError if a name of a lesson is missing."""
    imports, missing, texts, cells = set(), set(), {"toy": TOY_SEEDS}, []
    for file in LESSONS:
        lesson = (TOP / f"{file}.py").read_text().partition("# Here the lesson ends")[0]
        missing |= names_in(lesson) - {"main"}
        imports |= {line for line in re.findall(r"^(?:import|from) .+", lesson, re.M)
                    if line.split()[1] not in LESSONS}
        # In Markdown __ makes letters bold, and code begins after an empty line.
        docstring = ast.get_docstring(ast.parse(lesson)).replace("__", r"\_\_")
        texts[file] = re.sub(r"(\n\S.*\n)(?=    )", r"\1\n", docstring)
    for cutting, text, to_try in LECTURE:
        file, _, names = cutting.partition(":")
        code = cut_out(file, names) if names else ""
        missing -= names_in(code)
        cells.append(("markdown", re.sub(r"<(\w+)>", lambda mark: texts[mark[1]], text.strip())))
        cells.append(("code", "\n".join(sorted(imports)) if cutting == "imports" else code))
        cells.append(("code", to_try.strip()))
    assert not missing, f"not in the notebook: {missing}"
    for number, (title, file, part, other, question, cell, answer) in enumerate(EXERCISES, 1):
        source = (TOP / f"{file}.py").read_text()
        line = re.search(f".*{re.escape(part)}.*", source)[0].strip()
        change = f"```python\n{line}\n```\nbecomes\n```python\n{line.replace(part, other)}\n```"
        folded = f"<details><summary>What you should have seen</summary>\n\n{answer}\n</details>"
        where = f"`{file}.py`"
        if file in LESSONS:
            statement = next(node for node in ast.parse(source).body
                             if part in (ast.get_source_segment(source, node) or ""))
            where = f"the cell of `{statement.name}`, in chapter {1 + LESSONS.index(file)}"
        cells += [("markdown", f"### {number}. {title}\nIn {where}\n{change}\n{question}"),
                  ("code", cell.strip()), ("markdown", f"*Your answer:*\n\n{folded}")]
    return [(kind, text) for kind, text in cells if text]


def notebook(cells):
    """The text of the file: nbformat 4, without outputs."""
    more = {"markdown": {}, "code": {"execution_count": None, "outputs": []}}
    entries = [{"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
               | more[kind] for kind, text in cells]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": entries, "metadata": {"kernelspec": kernel}, "nbformat": 4,
                       "nbformat_minor": 4}, indent=1, ensure_ascii=False) + "\n"


def run(texts, namespace):
    """Run cells as Jupyter does: a picture as the last expression of one is displayed."""
    for text in texts:
        tree = ast.parse(text)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), namespace)
        value = last and eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
        if hasattr(value, "save"):
            namespace["display"](value)


if __name__ == "__main__":
    cells, pictures = cells_of_lecture(), []
    NOTEBOOK.write_text(notebook(cells))
    if "--run" in sys.argv:
        os.chdir(TOP)
        run([text for kind, text in cells if kind == "code"], {"display": pictures.append})
        os.makedirs("runs/lecture", exist_ok=True)
        for number, picture in enumerate(pictures):
            picture.save(f"runs/lecture/{number:02}.png")
