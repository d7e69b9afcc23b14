// A button that copies the code, and the code to read.

function render({ model, el }) {
  const button = document.createElement("button");
  const said = document.createElement("span");
  const details = document.createElement("details");
  const code = document.createElement("pre");
  const summary = document.createElement("summary");
  button.type = "button";
  button.className = "jupyter-button";
  button.textContent = "Copy code";
  summary.textContent = "the code that makes what is shown";
  said.setAttribute("role", "status");
  code.style.cssText = "overflow:auto;max-height:14em;user-select:text;font-size:12px";
  details.append(summary, code);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      said.textContent = " copied";
    } catch {
      details.open = true;
      said.textContent = " no clipboard here: select it below";
    }
  };
  const show = () => {
    code.textContent = model.get("code");
    said.textContent = "";
    button.disabled = !code.textContent;
  };
  show();
  model.on("change:code", show);
  el.append(button, said, details);
  return () => model.off("change:code", show);
}

export default { render };
