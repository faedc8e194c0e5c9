// Shows the page in Chinese if the browser's language is Chinese. The page is in English, and each text of it that
// differs in Chinese stands beside it: in `data-zh`, or in `data-zh-NAME` for the attribute NAME.
if (navigator.language.startsWith("zh")) {
  document.documentElement.lang = "zh-CN";
  for (const element of document.querySelectorAll("*")) {
    for (const { name, value } of [...element.attributes]) {
      if (name === "data-zh") element.textContent = value;
      else if (name.startsWith("data-zh-")) element.setAttribute(name.slice(8), value);
    }
  }
}
