// The sentences of the server's page and of the exported page, in English, and in Chinese if the browser prefers it.
// What a server or a model says itself, such as labels and the reasons of a refusal, stays as it is.

export const CHINESE = {
  // The server's page
  "deit: what is in this picture?": "deit：这张图片里是什么？",
  "API key": "API 密钥",
  "The image that was sent": "已发送的图片",
  "What it looked at": "模型关注的区域",
  "Show what it looked at": "显示模型关注的区域",
  "Hide what it looked at": "隐藏模型关注的区域",
  "Looking closer\u2026": "正在仔细分析\u2026",
  "Map of": "热力图所属",
  "the class token": "类别 token",
  "the distillation token": "蒸馏 token",
  "The image as the model saw it": "模型实际看到的图片",
  "from violet to yellow": "从紫色到黄色",
  "counts least": "影响最小",
  "counts most": "影响最大",
  "Map over the image, strongest {place}": "叠加在图片上的热力图，影响最大处：{place}",
  "The class token answers \u201c{label}\u201d. Its map is strongest {place}.":
    "类别 token 的回答是\u201c{label}\u201d，影响最大处：{place}。",
  "The distillation token answers \u201c{label}\u201d. Its map is strongest {place}.":
    "蒸馏 token 的回答是\u201c{label}\u201d，影响最大处：{place}。",
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
  "The API": "API 说明",
  "The server can\u2019t be reached; try again later.": "无法连接服务器，请稍后再试。",
  "It takes {formats}, up to {size} MiB.": "支持 {formats} 格式，文件不超过 {size} MiB。",
  // The exported page
  "The model runs on this device. Images stay here: nothing is sent anywhere.":
    "模型在本设备上运行。图片不会离开本机，也不会发送到任何地方。",
  "The image that was given": "所选的图片",
  "Loading the model": "正在加载模型",
  "{done} of {total} MB": "{done} / {total} MB",
  "Waiting for the model\u2026": "正在等待模型加载\u2026",
  "This browser can\u2019t run the model: it has no WebAssembly, or is too old. Update it, or try another one.":
    "此浏览器无法运行模型：它不支持 WebAssembly，或版本过旧。请更新浏览器，或换一个浏览器。",
  "The model can\u2019t be started: a file of this page is missing or damaged, or the browser is too old.":
    "模型无法启动：本页面的某个文件缺失或损坏，或者浏览器版本过旧。",
  "The model can\u2019t be loaded ({reason}). Reload the page to try again.": "模型加载失败（{reason}）。请刷新页面重试。",
  "The model can\u2019t answer ({reason}). Try a smaller image, or reload the page.":
    "模型无法给出结果（{reason}）。请换一张更小的图片，或刷新页面。",
  "{name} can\u2019t be reached": "无法获取 {name}",
  "This browser can\u2019t read that as an image. Choose a JPEG, PNG or WebP file.":
    "此浏览器无法将该文件读取为图片。请选择 JPEG、PNG 或 WebP 文件。",
  "The image has {width} \u00d7 {height} pixels, more than {most} in all. Choose a smaller one.":
    "图片有 {width} \u00d7 {height} 像素，总数超过 {most}。请选择更小的图片。",
  // Both
  "What is in this picture?": "这张图片里是什么？",
  "Choose an image": "选择图片",
  "Take a photo": "拍照",
  "or drop one here, or paste it.": "也可以将图片拖放到这里，或直接粘贴。",
  "That was not an image file. Choose one from this device.": "这不是图片文件。请从本设备中选择一张图片。",
  "The labels": "全部标签",
  "Result": "结果",
  "Looking\u2026": "正在识别\u2026",
  "This model tells {count} labels apart.": "此模型可区分 {count} 个标签。",
  "This model says how likely its label is.": "此模型给出其标签成立的概率。",
  "This model says how likely each of {count} labels is, by itself.": "此模型分别给出 {count} 个标签各自成立的概率。",
  "This model measures 1 quantity.": "此模型测量 1 个量。",
  "This model measures {count} quantities.": "此模型测量 {count} 个量。",
  "Measured": "测量结果",
  "How likely each label is": "各标签的概率",
  "I don\u2019t know": "无法确定",
  "No single label is certain enough. The candidates:": "没有哪一个标签足够可靠。候选标签：",
  "Sure: at most {share} of images like this get a label that is sure and wrong.":
    "可靠：对这类图片，\u201c可靠\u201d却错误的标签至多占 {share}。",
  "under 0.1 %": "不到 0.1 %",
};

const chinese = /^zh\b/i.test(globalThis.navigator?.language ?? "");

// The text in the reader's language, with its {fields} filled in.
export function said(text, fields = {}) {
  return ((chinese && CHINESE[text]) || text).replace(/\{(\w+)\}/g, (_, name) => fields[name]);
}

// Puts what the page's own HTML says into the reader's language.
export function translate() {
  if (!chinese) return;
  document.documentElement.lang = "zh-CN";
  const texts = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const own = texts.currentNode, text = own.data.trim().replace(/\s+/g, " ");
    if (CHINESE[text]) own.data = own.data.replace(own.data.trim(), () => CHINESE[text]);
  }
  for (const name of ["alt", "aria-label"]) {
    for (const each of document.querySelectorAll(`[${name}]`)) {
      each.setAttribute(name, said(each.getAttribute(name)));
    }
  }
}
