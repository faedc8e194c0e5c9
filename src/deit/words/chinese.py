"""The Chinese of what reports say: each template of `words.said`, and the same template in Chinese.

The terms are those of the Chinese guides. Names of commands, files, heads and fields stay as they are.
"""

CHINESE = {
    # joints
    ", ": "、",
    "; ": "；",
    ": ": "：",
    " ": "",
    '"{name}"': "“{name}”",
    "{names} and {more:,} more": "{names}等，另有 {more:,} 个",
    "{low:.2f} to {high:.2f}": "{low:.2f} 到 {high:.2f}",
    "{low:.3f} to {high:.3f}": "{low:.3f} 到 {high:.3f}",
    # the head of the page
    "Report: {name}": "报告：{name}",
    "Unfinished run: {name}": "尚未完成的训练：{name}",
    "{count:,} class": "{count:,} 个类别",
    "{count:,} classes": "{count:,} 个类别",
    "Contents": "目录",
    "Skip to the content": "跳到正文",
    "Trained {date}": "训练于 {date}",
    "{folder}: {facts}.": "{folder}：{facts}。",
    "{folder}: the recipe {recipe}, {facts}.": "{folder}：配方 {recipe}，{facts}。",
    "a run that has not written any metrics": "这次训练还没有写出任何指标",
    "{steps:,.0f} steps": "{steps:,.0f} 步",
    "{steps}, {epochs:,.4g} epochs": "{steps}，{epochs:,.4g} 轮",
    "{steps}, on {images:,} images": "{steps}，{images:,} 张图像",
    "{images} of {classes:,} classes": "{images}，{classes:,} 个类别",
    "{count:,.0f} steps were skipped because their loss or gradient was not finite": (
        "跳过了 {count:,.0f} 步，因为损失或梯度不是有限值"
    ),
    "{count:,.0f} training images can't be read": "{count:,.0f} 张训练图像无法读取",
    "Judged by {count:,} {images} of {classes} classes, at {size}.": (
        "用{images}评判：{count:,} 张，{classes} 个类别，{size}。"
    ),
    "{shown:,} of the model's {all:,}": "模型 {all:,} 个类别中的 {shown:,}",
    "{height} by {width} pixels": "{height} × {width} 像素",
    "{size} and crop ratio {ratio:.4g}": "{size}，裁剪比例 {ratio:.4g}",
    "{count:,} more can't be read and are left out.": "另有 {count:,} 张无法读取，没有计入。",
    "accuracy, {heads}": "准确率，{heads}",
    "balanced accuracy": "平衡准确率",
    "mean of {count:,} recall": "{count:,} 个召回率的平均值",
    "mean of {count:,} recalls": "{count:,} 个召回率的平均值",
    "top-5 accuracy": "top-5 准确率",
    "calibration error": "校准误差",
    "negative log likelihood {nll:.3f}": "负对数似然 {nll:.3f}",
    "{correct:,} of {total:,}": "{correct:,} / {total:,} 张",
    "loss on validation images": "验证图像上的损失",
    "accuracy on validation images": "验证图像上的准确率",
    "after step {step:,}": "第 {step:,} 步之后",
    "training time": "训练时间",
    "at most {memory:.1f} GiB of memory": "最多占用 {memory:.1f} GiB 内存",
    "images/s in training": "训练速度（张/秒）",
    "Written {date} by deit {version}. Intervals are Wilson's, at 95 %; that of the balanced accuracy takes the "
    "effective number of images.": (
        "由 deit {version} 写于 {date}。区间是 95% 的 Wilson 区间，其中平衡准确率的区间按有效图像数计算。"
    ),
    # a run that trains, and a fit
    "run": "训练",
    "fit": " fit ",
    "This {what} is not finished": "这次{what}尚未完成",
    "A signal or an error has ended the {what} early; its terminal or log says which.": (
        "这次{what}因为信号或错误而提前结束，原因见终端或日志。"
    ),
    "The same command goes on with --resume.": "同一条命令加上 --resume 就会接着训练。",
    "The same command goes on.": "再次运行同一条命令就会接着做。",
    "A step has reached its end, and the next one follows.": "一个步骤已经结束，接下来是下一个步骤。",
    "No model trains in this step. The page shows the latest run.": "这一步不训练模型。本页显示的是最近一次训练。",
    "The numbers are those of the latest evaluation. The page loads itself again while the run goes on, and the report "
    "replaces it at the end. If its date stays the same for long, the run was killed, or its disk is full: look into "
    "its terminal or log.": (
        "这些数字来自最近一次评测。训练进行时本页会自动刷新，训练结束后由报告代替。"
        "如果本页的时间很久不变，说明训练已被终止，或者磁盘已满，请查看终端或日志。"
    ),
    "{share:.0%} of the recent time went by waiting for images. Resume with more loader processes (compute.workers), "
    "or install the extra fast.": (
        "最近有 {share:.0%} 的时间在等待图像。请增加加载进程（compute.workers）后接着训练，或者安装可选依赖 fast。"
    ),
    "steps": "步数",
    "{step:,.0f} of {total:,}": "{step:,.0f} / {total:,}",
    "epochs": "轮数",
    "training time so far": "已训练时间",
    "time left": "剩余时间",
    "about {time}": "约 {time}",
    "best accuracy so far": "目前最高的准确率",
    "lowest loss on validation images so far": "验证图像上目前最低的损失",
    "{value:.4g}, after step {step:,.0f}": "{value:.4g}，第 {step:,.0f} 步之后",
    "this page": "本页",
    "as of {date}": "截至 {date}",
    "The steps of the fit": "这次 fit 的步骤",
    "Steps": "步骤",
    "step of the plan": "计划中的步骤",
    "state": "状态",
    "validation accuracy": "验证准确率",
    "what it does": "内容",
    "now": "进行中",
    "to come": "未开始",
    "done in {time}": "已完成，用时 {time}",
    "The models that were compared": "参与比较的模型",
    "{name} (recommended)": "{name}（推荐）",
    "val": "验证",
    "images/s": "张/秒",
    # the recommendation of a fit
    "frozen baseline": "冻结基线",
    "teacher": "教师",
    "student": "学生",
    " and ": "，",
    " and the ": "和",
    "the {name} is the only model": "只有{name}这一个模型",
    "the {name} is right on {correct} of {total} validation images, {rest}": (
        "{total} 张验证图像中，{name}答对 {correct} 张，{rest}"
    ),
    "the {name} on {correct}": "{name}答对 {correct} 张",
    "it is the fastest of those that are not surely worse than the {name}": "在不能断定比{name}差的模型中，它最快",
    "it gives the true classes higher probabilities than the {names}": "它给真实类别的概率比{names}更高",
    "the difference to the {names} may be chance": "与{names}的差距可能只是偶然",
    # warnings, and what the numbers of images make hard
    "Beware": "请注意",
    'warning: the accuracy {accuracy:.3f} is not above {share:.3f}, the share of "{commonest}" among these images, so '
    "the model is no better than this one answer. Check that the labels and the preprocessing are right, train longer, "
    "or lower the learning rate": (
        "警告：准确率 {accuracy:.3f} 没有超过“{commonest}”在这些图像中所占的比例 {share:.3f}，"
        "所以这个模型并不比永远只答这一个类别更好。请检查标签和预处理是否正确，延长训练，或者降低学习率"
    ),
    "warning: the student is right on {accuracy:.3f} of the validation images, its teacher on {teacher:.3f} of "
    "{total:,} of them{chance}. Compare both on test images (deit eval --compare), train longer, or take the teacher "
    "itself": (
        "警告：学生在验证图像上的准确率是 {accuracy:.3f}，教师在其中 {total:,} 张上的准确率是 {teacher:.3f}{chance}。"
        "请在测试图像上比较两者（deit eval --compare），延长训练，或者直接使用教师"
    ),
    ", which may be chance": "，这一差距可能只是偶然",
    "warning: if these validation images chose the model in its training, their accuracy flatters it. Test images do "
    "not: take the test part of the data, or set one aside with `deit split` and train again": (
        "警告：如果模型在训练中是用这些验证图像挑选出来的，那么它们给出的准确率偏高。测试图像没有这个问题："
        "请使用数据的测试部分，或者用 `deit split` 划出一部分，再重新训练"
    ),
    "warning: the temperature of the head {head} is the least that is tried ({low:g}), because it is right on almost "
    "all of the {images:,} images, so they can't tell how sure it may be. Calibrate with more or harder images": (
        "警告：头 {head} 的温度是所尝试的最小值（{low:g}），因为它在 {images:,} 张图像上几乎全对，"
        "所以从这些图像看不出它可以有多大把握。请用更多或更难的图像来校准"
    ),
    "warning: the temperature of the head {head} is the greatest that is tried ({high:g}), because its probabilities "
    "tell next to nothing about the labels of the {images:,} images. Check labels and preprocessing with deit eval": (
        "警告：头 {head} 的温度是所尝试的最大值（{high:g}），因为它给出的概率与 {images:,} 张图像的标签几乎无关。"
        "请用 deit eval 检查标签和预处理"
    ),
    'the classes differ much in size: of {total:,} training images, "{largest}" has {most:,} and "{smallest}" has '
    "{least:,}. So the model learns mostly the large classes, and a high accuracy may hide that it misses the small "
    "ones. To let each class count the same, use --set objective.class_weights=balanced (for deit fit, set it in the "
    "recipes beside its plan.json), and look at the balanced accuracy": (
        "各个类别的图像数相差很大：在 {total:,} 张训练图像中，“{largest}”有 {most:,} 张，“{smallest}”有 {least:,} 张。"
        "因此模型主要学到大的类别，准确率再高，也可能掩盖它认不出小的类别。要让每个类别的分量相同，"
        "请使用 --set objective.class_weights=balanced（使用 deit fit 时，在 plan.json 旁边的配方里设置），"
        "并查看平衡准确率"
    ),
    "{count:,} class has fewer than {least} training images, too few to learn from: {classes}. Add images, or leave "
    "such classes out": (
        "有 {count:,} 个类别的训练图像少于 {least} 张，太少，学不到东西：{classes}。请增加图像，或者去掉这样的类别"
    ),
    "{count:,} classes have fewer than {least} training images, too few to learn from: {classes}. Add images, or leave "
    "such classes out": (
        "有 {count:,} 个类别的训练图像少于 {least} 张，太少，学不到东西：{classes}。请增加图像，或者去掉这样的类别"
    ),
    '"{name}" ({images:,})': "“{name}”（{images:,}）",
    "{count:,} class has no validation image, so nothing tells how well the model knows it: {classes}. Add such "
    "images": "有 {count:,} 个类别没有验证图像，所以无从知道模型掌握得如何：{classes}。请增加这样的图像",
    "{count:,} classes have no validation image, so nothing tells how well the model knows them: {classes}. Add such "
    "images": "有 {count:,} 个类别没有验证图像，所以无从知道模型掌握得如何：{classes}。请增加这样的图像",
    # accuracy
    "Evaluation": "评测",
    "Accuracy": "准确率",
    "accuracy": "准确率",
    "model": "模型",
    "head": "头",
    "95 % interval": "95% 置信区间",
    "correct": "正确数",
    "balanced": "平衡准确率",
    "Accuracy of each head": "每个头的准确率",
    "Accuracy of each head, with 95 % intervals": "每个头的准确率，以及 95% 置信区间",
    "Accuracy of each head with its 95 % interval": "每个头的准确率及其 95% 置信区间",
    "{name} {value:.3f}, 95 % interval {low:.3f} to {high:.3f}": (
        "{name} {value:.3f}，95% 置信区间 {low:.3f} 到 {high:.3f}"
    ),
    "Balanced accuracy is the mean of the recalls of the classes that have images, so each class counts the same.": (
        "平衡准确率是有图像的各个类别的召回率的平均值，所以每个类别的分量都相同。"
    ),
    "No image shows {classes}.": "没有图像属于{classes}。",
    "The model learnt to paint hidden patches and has no classes to judge. Its loss is drawn below.": (
        "模型学习的是画出被遮住的图块，没有可以评判的类别。它的损失曲线见下文。"
    ),
    "Accuracy of the model that was kept, on the validation images after step {step:,.0f}. It was chosen by the first "
    "of these numbers, so they flatter it. Test images do not.": (
        "所保留的模型在第 {step:,.0f} 步之后在验证图像上的准确率。模型是按其中第一个数字挑选出来的，"
        "所以这些数字偏高。测试图像上的准确率没有这个问题。"
    ),
    "The run has no evaluation yet.": "这次训练还没有评测过。",
    "Calibration, confusions, classes and single images follow when the run is finished.": (
        "校准、混淆、各个类别和单张图像的内容，要等训练结束后才有。"
    ),
    "Calibration, confusions, classes and single images appear here after {command}.": (
        "运行 {command} 之后，这里会有校准、混淆、各个类别和单张图像的内容。"
    ),
    "The training was so short that the model was not evaluated again on its {count:,} validation images.": (
        "训练时间很短，所以没有在 {count:,} 张验证图像上再次评测模型。"
    ),
    "The run's validation images were not evaluated: {error}.": "没有在这次训练的验证图像上评测：{error}。",
    # comparison
    "Comparison": "比较",
    "The {head} heads of two models, on the {count:,} images that both could read.": (
        "在两个模型都能读取的 {count:,} 张图像上，比较它们的 {head} 头。"
    ),
    "Two models on the same images": "相同图像上的两个模型",
    "only this one correct": "只有它正确",
    "Difference {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (Newcombe's, for paired proportions). "
    "McNemar's exact test: p = {p:.3g}.": (
        "差异 {difference:+.4f}，95% 置信区间 {low:+.4f} 到 {high:+.4f}（配对比例的 Newcombe 区间）。"
        "McNemar 精确检验：p = {p:.3g}。"
    ),
    # training
    "Training": "训练",
    "Loss": "损失",
    "Learning rate": "学习率",
    "{title} over steps": "{title}随步数的变化",
    "{lines}, over {steps:,.6g} steps": "{lines}，共 {steps:,.6g} 步",
    "{name} from {first:.4g} to {last:.4g}": "{name}从 {first:.4g} 到 {last:.4g}",
    "{title}: the metrics hold no number that could be drawn.": "{title}：指标里没有可以画出的数字。",
    "The run has not written any metrics.": "这次训练还没有写出任何指标。",
    "training": "训练",
    "validation": "验证",
    "training views": "训练视图",
    "agreement with the teacher": "与教师一致的比例",
    "validation, fused heads": "验证，两头融合",
    "validation, balanced": "验证，平衡准确率",
    "validation, class head": "验证，类别头",
    "validation, distillation head": "验证，蒸馏头",
    "learning rate": "学习率",
    "The numbers of the curves": "曲线的数字",
    "Metrics": "指标",
    "{kept:,} of {all:,} rows; metrics.jsonl holds all.": "{all:,} 行中的 {kept:,} 行，全部内容见 metrics.jsonl。",
    "step": "步",
    "epoch": "轮",
    "loss": "损失",
    "val loss": "验证损失",
    "agreement": "与教师一致",
    "val accuracy": "验证准确率",
    "val balanced accuracy": "验证平衡准确率",
    "val accuracy class": "验证准确率，类别头",
    "val accuracy distillation": "验证准确率，蒸馏头",
    "lr": "学习率",
    "no number": "不是数字",
    # calibration
    "Calibration": "校准",
    "Accuracy over confidence, with 95 % intervals, and below it the images in each bin": (
        "各置信度下的准确率及 95% 置信区间，下方是每个区间的图像数"
    ),
    "Accuracy over confidence, and the images in each bin": "各置信度下的准确率，以及每个区间的图像数",
    "confidence {x:.2f}, accuracy {y:.2f}": "置信度 {x:.2f}，准确率 {y:.2f}",
    "Confidence is the largest probability of the {heads}. On the dashed line, confidence equals accuracy. Above the "
    "line the model is not sure enough, and below the line it is too sure.": (
        "置信度是{heads}给出的最大概率。虚线表示置信度等于准确率。在虚线之上，模型的把握偏低；在虚线之下，模型过于自信。"
    ),
    "fused heads": "两头融合",
    "softmax head": "两头 softmax 的平均",
    "class head": "类别头",
    "distillation head": "蒸馏头",
    "expected calibration error": "期望校准误差",
    "Brier score": "Brier 分数",
    "negative log likelihood": "负对数似然",
    "The numbers of the diagram": "图中的数字",
    "confidence": "置信度",
    "mean confidence": "平均置信度",
    "images": "图像",
    # confusions and classes
    "Confusions": "混淆",
    "Confusion matrix": "混淆矩阵",
    "Images by true class (rows) and answer (columns)": "按真实类别（行）和预测类别（列）统计的图像数",
    "true ↓ answered →": "真实 ↓ 预测 →",
    "{count:,} others": "其余 {count:,} 个",
    "No image was taken for another class.": "没有图像被误认为别的类别。",
    "The {count} classes with the most confusions, and the {rest:,} others together. If one of the others was taken "
    "for another of them, it is shown as right.": (
        "混淆最多的 {count} 个类别，其余 {rest:,} 个合在一起。其余类别之间的混淆在这里显示为正确。"
    ),
    "{count:,} class of the model without images or answers is left out.": (
        "模型中有 {count:,} 个类别既没有图像也没有被预测过，没有列出。"
    ),
    "{count:,} classes of the model without images or answers are left out.": (
        "模型中有 {count:,} 个类别既没有图像也没有被预测过，没有列出。"
    ),
    "Most common confusions": "最常见的混淆",
    "taken for": "误认为",
    "share of the class": "占该类别的比例",
    "Classes": "类别",
    "All classes": "所有类别",
    "All {count:,} classes": "所有 {count:,} 个类别",
    "Worst classes": "表现最差的类别",
    "{count:,} class without images or answers is left out.": (
        "有 {count:,} 个类别既没有图像也没有被预测过，没有列出。"
    ),
    "{count:,} classes without images or answers are left out.": (
        "有 {count:,} 个类别既没有图像也没有被预测过，没有列出。"
    ),
    "class": "类别",
    "answered": "预测数",
    "precision": "精确率",
    "recall": "召回率",
    # images
    "Images": "图像",
    "Pictures": "图片",
    "validation images": "验证图像",
    "training images": "训练图像",
    "test images": "测试图像",
    "{images} in {folder}": " {folder} 中的{images}",
    "The files of the images are not known, so no image is shown.": "不知道图像的文件在哪里，所以没有显示图像。",
    "This image can't be read any more.": "这张图像已经无法读取。",
    "Most wrong": "错得最离谱的图像",
    "Wrong answers of the highest confidence: hard images, or wrong labels.": (
        "置信度最高的错误答案：可能是图像很难，也可能是标签写错了。"
    ),
    "No answer is wrong.": "没有错误的答案。",
    "Most doubtful": "最没有把握的图像",
    "Answers of the lowest confidence, right or wrong.": "置信度最低的答案，不论对错。",
    "There are no other images.": "没有其他图像。",
    "Surest right answers": "最有把握的正确答案",
    "True label {label}; predicted {answer} with probability {probability:.2f}": (
        "真实标签 {label}；预测为 {answer}，概率 {probability:.2f}"
    ),
    "answered ": "预测为 ",
    ", correct": "，正确",
    "true ": "真实为 ",
    "Validation images, the parts that the model saw, and what it painted in the hidden patches ({file})": (
        "验证图像、模型看到的部分，以及模型在被遮住的图块中画出的内容（{file}）"
    ),
    # maps
    "What answers rest on": "答案的依据",
    "What the answers rest on could not be shown: {error}.": "无法显示答案的依据：{error}。",
    "Gradient-weighted relevance ({source}) follows attention through all blocks, as far as it supports the answer of "
    "{head}. Each map lies over the image as the model saw it, in grey. You can compare colours within a map, but not "
    "between maps. {command} draws other methods too, and scores them.": (
        "梯度加权的相关性（{source}）沿着所有 Transformer 块追踪注意力，只计入支持{head}所给答案的部分。"
        "每张热图都叠加在模型所看到的图像上，图像显示为灰度。同一张热图里的颜色可以比较，不同热图的颜色不能比较。"
        "{command} 还能画出其他方法的热图，并给出得分。"
    ),
    "the model": "模型",
    "each token\u2019s own head": "每个 token 自己的头",
    "counts least {scale} counts most": "影响最小 {scale} 影响最大",
    "from violet to yellow": "从紫色到黄色",
    "as the model saw it": "模型看到的图像",
    "class token": "类别 token",
    "distillation token": "蒸馏 token",
    "Map of the {token}, which answers {answer}: strongest {strongest}": (
        "{token} 的热图，答案为 {answer}；影响最大处：{strongest}"
    ),
    "in the upper left": "左上方",
    "at the top": "上方",
    "in the upper right": "右上方",
    "on the left": "左侧",
    "in the middle": "中间",
    "on the right": "右侧",
    "in the lower left": "左下方",
    "at the bottom": "下方",
    "in the lower right": "右下方",
    "nowhere more than elsewhere": "各处相同",
    # recipe
    "Recipe": "配方",
    "Recipe: {part}": "配方：{part}",
    "No shipped recipe has this name, so there is none to compare with.": "没有这个名称的自带配方，所以无从比较。",
    "Changed from the shipped recipe of this name": "与同名自带配方的差异",
    "The shipped recipe of this name, unchanged.": "与同名的自带配方完全相同。",
    "The whole recipe": "完整的配方",
    "field": "字段",
    "shipped": "自带配方",
    "here": "这里",
    "value": "值",
    # data
    "Data": "数据",
    "folder": "文件夹",
    "the images have no common folder": "这些图像不在同一个文件夹里",
    "classes": "类别数",
    "fingerprint of the training images": "训练图像的指纹",
    "fingerprint of the evaluated images": "评测图像的指纹",
    "evaluated": "评测图像",
    "{count:,} {images}": "{images}，{count:,} 张",
    "The images that the run was trained on are not known: {gap}.": "不知道训练用的是哪些图像：{gap}。",
    "Images of each class": "每个类别的图像数",
    "Images of each class: {low:,} to {high:,} in training": "每个类别的图像数：训练图像 {low:,} 到 {high:,} 张",
    "{count:,} image that can't be read": "{count:,} 张图像无法读取",
    "{count:,} images that can't be read": "{count:,} 张图像无法读取",
    "Images that can't be read": "无法读取的图像",
    "file": "文件",
    "reason": "原因",
    # machine and commands
    "Speed and machine": "速度与机器",
    "device": "设备",
    "processes": "进程数",
    "numeric precision": "数值精度",
    "rate of recent steps": "最近的训练速度",
    "{rate:,.1f} images/s": "{rate:,.1f} 张/秒",
    "share of the time spent on waiting for images": "等待图像的时间所占的比例",
    "views shown": "已用的视图数",
    "largest memory": "最大内存占用",
    "Neither the metrics nor about.json say how fast the run was, or on which machine.": (
        "指标和 about.json 都没有说明训练的速度和所用的机器。"
    ),
    "How to repeat it": "如何重现",
    "Commands": "命令",
}
